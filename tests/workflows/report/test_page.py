"""The page loads nothing from elsewhere, escapes texts, and has every section.

Covers: workflows/report/markup.py, workflows/report/pictures.py,
workflows/report/questions.py, workflows/report/run.py, workflows/report/scores.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from smalti.artifact import Artifact
from smalti.schema import Recipe
from smalti.workflows import report
from tests.workflows.report.example_run import Page


def test_page_loads_nothing_from_elsewhere(recipe: Recipe, artifacts: list[Artifact]) -> None:
    html_path, _ = report.build(recipe, artifacts, recipe.out)
    html = Path(html_path).read_text()
    page = Page(html)
    assert page.stack == []
    images = page.of("img")
    assert len(images) == 6
    assert all(
        (image["src"] or "").startswith("data:image/png;base64,") and image["alt"]
        for image in images
    )
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base"}
    )
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "xlink:href", "style"):
            value = attributes.get(name) or ""
            assert "//" not in value.partition(",")[0], (name, value[:80])
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_strangers_texts_stay_text(recipe: Recipe, artifacts: list[Artifact]) -> None:
    html_path, _ = report.build(recipe, artifacts, recipe.out)
    html = Path(html_path).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_every_section_of_a_whole_run_is_there(recipe: Recipe, artifacts: list[Artifact]) -> None:
    html_path, _ = report.build(recipe, artifacts, recipe.out)
    page = Page(Path(html_path).read_text())
    sections = [attributes["id"] for attributes in page.of("section")]
    assert sections == [
        "scores", "run", "reconstructions", "gallery", "codes", "drawings", "questions", "zero-shot", "curves", "corpus",
        "recipe", "artifacts", "mlflow",
    ]  # fmt: skip
    assert [f"#{section}" for section in sections] == [link["href"] for link in page.of("a")]
    text = " ".join(page.words)
    for expected in ("92.0 %", "goal ≥ 90.0 %: reached", "goal ≥ 24.00 dB: not reached", "tokenizer/pixel", "truncated",
                     "fewer tokens than codes", "mlflow ui --backend-store-uri sqlite:///", "guidance"):  # fmt: skip
        assert expected in text, expected
    charts = [svg["aria-label"] or "" for svg in page.of("svg")]
    assert any("1 points were not finite" in label for label in charts)
    assert not any("samples_per_s" in label for label in charts)
