"""The report: its JSON has the promised shape, its page loads nothing from elsewhere, and parts may
be missing.

Covers: workflows/report/__init__.py, workflows/report/build.py, workflows/report/charts.py,
workflows/report/facts.py, workflows/report/machine.py, workflows/report/markup.py,
workflows/report/names.py, workflows/report/page.py, workflows/report/pictures.py,
workflows/report/questions.py, workflows/report/run.py, workflows/report/scores.py,
workflows/report/terminal.py.
"""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti import artifact
from smalti.artifact import Artifact
from smalti.config import with_overrides
from smalti.schema import Recipe
from smalti.ticks import log_ticks, nice_ticks, tick_text, tick_texts
from smalti.workflows import report
from smalti.workflows.evaluation.scores.answers import breakdown
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score, save_result
from smalti.workflows.report.charts import YRange, line_chart, rank_chart, thin, y_range
from smalti.workflows.report.facts import history
from smalti.workflows.report.names import duration, goal_met, ordered, written

NASTY = '<script>alert("x")</script> & "quoted" \' </style>'
EMPTY_ELEMENTS = {"meta", "img", "line", "br", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Attributes of every element, the text, and whether the elements close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY_ELEMENTS:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def finish(
    out: Path,
    name: str,
    counts: dict[str, int],
    seconds: float = 1.0,
    scores: dict[str, Any] | None = None,
) -> Artifact:
    place = artifact.begin(str(out / name), name.rsplit("/", 1)[-1], {"source": NASTY}, {})
    assert isinstance(place, artifact.Workspace)
    return place.finish(counts, seconds, scores=scores)


def write_history(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(out: Path, folder: str = "evaluate") -> Artifact:
    """An evaluation with every table, its texts as nasty as a stranger's captions may be."""
    picture = np.zeros((8, 8, 3), np.uint8)
    names = [
        "reconstruction-00-input",
        "reconstruction-00-semantic",
        "reconstruction-00-decoded",
        "code-00-0",
        "drawing-00",
        "question-00",
    ]
    part = MeasureResult(
        scores={
            "qa/accuracy": Score(0.92, 2000, baseline={"question_only": 0.67}),
            "reconstruction/psnr": Score(23.0, 100),
            "own/measure": Score(3.0, 7, higher_is_better=False),
        },
        pictures=dict.fromkeys(names, picture),
    )
    place = artifact.begin(str(out / folder), folder, {}, {})
    assert isinstance(place, artifact.Workspace)
    record = save_result(place.path, "all", part)
    grid = {
        "image_id": "1",
        "caption": NASTY,
        "input": names[0],
        "semantic": names[1],
        "decoded": names[2],
        "psnr": 23.0,
    }
    hits = [True, False, True]
    tables = {
        "grid": [grid | {"psnr_semantic_only": 20.0}],
        "psnr": {"p05": 20.0, "p50": 23.0, "p95": 27.0},
        "gallery": [{"code": 5, "patches": 12, "images": 9, "pictures": ["code-00-0"]}],
        "gallery_of": "semantic",
        "histogram": {"points": [[1, 50], [2, 3], [3, 0]], "codes": 3000, "used": 2, "tokens": 53},
        "drawings": [
            {
                "picture": "drawing-00",
                "prompt": NASTY,
                "label": "red",
                "seen": {"judge": NASTY, "zero_shot": "red"},
            }
        ],
        "questions": {"by_kind": breakdown([NASTY, "b", "b"], hits, hits)},
        "examples": [
            {
                "picture": "question-00",
                "question": NASTY,
                "answer": NASTY,
                "given": NASTY,
                "right": False,
            }
        ],
        "zero_shot": {
            "classes": [{"key": NASTY, "n": 3, "accuracy": 0.5}],
            "sentences": {NASTY: NASTY},
        },
        "skipped": {"retrieval": NASTY},
    }
    (out / folder / "tables.json").write_text(json.dumps(tables))
    made = place.finish({"scores": 3}, 9.0, scores=record["scores"])
    scores = {key: dict(score) for key, score in made.scores.items()}
    scores["qa/accuracy"]["goal"], scores["reconstruction/psnr"]["goal"] = 0.9, 24.0
    return Artifact(**{**vars(made), "scores": scores})


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    changes = {"out": str(tmp_path), "baselines": {"pixel_codes": {"tokenizer.guidance": False}}}
    return with_overrides(Recipe(name=NASTY), changes)


@pytest.fixture
def artifacts(recipe: Recipe, tmp_path: Path) -> list[Artifact]:
    """A whole run with phases, histories and a baseline."""
    write_rows = [
        {"step": step, "loss": 5.0 / step, "lr": 1e-3, "samples_per_s": 9} for step in range(1, 40)
    ]
    corpus = finish(
        tmp_path,
        "corpus",
        {"train": 90, "val": 10, "quarantined": 3, "quarantined/truncated": 3},
        2.0,
    )
    phase = tmp_path / "tokenizer" / "phases" / "pixel"
    finish(tmp_path, "tokenizer/phases/pixel", {"steps": 40}, 30.0)
    write_history(phase, write_rows)
    record = artifact.Workspace(str(tmp_path / "tokenizer"), "tokenizer", {}, {}, "0" * 16, False)
    tokenizer = record.finish({"codes": 24}, 40.0)
    mllm = finish(tmp_path, "mllm", {"steps": 40}, 100.0)
    write_history(tmp_path / "mllm", [*write_rows, {"step": 40, "loss": float("nan")}])
    finish(tmp_path, "baselines/pixel_codes/mllm", {"steps": 40}, 90.0)
    return [corpus, tokenizer, mllm, evaluation(tmp_path)]


def test_json_has_the_promised_shape(
    recipe: Recipe, artifacts: list[Artifact], tmp_path: Path
) -> None:
    _, json_path = report.build(recipe, artifacts, recipe.out, started=time.time() - 5)
    found = json.loads(Path(json_path).read_text())
    assert list(found) == [
        "name",
        "version",
        "recipe",
        "machine",
        "started",
        "seconds",
        "stages",
        "scores",
    ]
    assert found["name"] == NASTY
    assert found["recipe"]["out"] == str(tmp_path)
    assert found["machine"]["cores"] >= 1
    assert "torch" in found["machine"]["versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["started"])
    assert found["seconds"] == pytest.approx(
        2 + 40 + 100 + 9 + 90, abs=1
    )  # the work, which is longer than the command
    assert [stage["name"] for stage in found["stages"]] == [
        "corpus", "tokenizer", "mllm", "evaluate", "baselines/pixel_codes/mllm",
    ]  # fmt: skip
    assert all(set(stage) == {"name", "seconds", "artifact"} for stage in found["stages"])
    assert Path(found["stages"][0]["artifact"]).is_dir()
    for score in found["scores"].values():
        assert set(score) == {"value", "n", "split", "higher_is_better", "baseline"}
    assert found["scores"]["qa/accuracy"]["baseline"] == {"question_only": 0.67}


def test_wall_time_counts_where_it_is_longer(recipe: Recipe, artifacts: list[Artifact]) -> None:
    _, json_path = report.build(recipe, artifacts, recipe.out, started=time.time() - 3600)
    assert json.loads(Path(json_path).read_text())["seconds"] == pytest.approx(3600, abs=60)


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


def test_an_evaluation_in_the_folder_of_earlier_versions_is_reported(
    recipe: Recipe, tmp_path: Path
) -> None:
    html_path, json_path = report.build(recipe, [evaluation(tmp_path, "evaluation")], recipe.out)
    assert len(Page(Path(html_path).read_text()).of("img")) == 6
    assert json.loads(Path(json_path).read_text())["scores"]["qa/accuracy"]["value"] == 0.92


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_parts_may_be_missing(recipe: Recipe, artifacts: list[Artifact], kept: int) -> None:
    lonely = with_overrides(recipe.model_copy(update={"baselines": {}}), {"tracking.uri": "off"})
    html_path, json_path = report.build(lonely, artifacts[:kept], recipe.out)
    page = Page(Path(html_path).read_text())
    assert page.of("img") == []
    sections = {attributes["id"] for attributes in page.of("section")}
    assert sections.isdisjoint({"scores", "drawings", "questions", "mlflow"})
    found = json.loads(Path(json_path).read_text())
    assert found["scores"] == {}
    assert len(found["stages"]) == kept


def test_an_evaluation_without_questions_or_pictures(
    recipe: Recipe, artifacts: list[Artifact], tmp_path: Path
) -> None:
    (tmp_path / "evaluate" / "tables.json").write_text(json.dumps({"skipped": {}}))
    html_path, _ = report.build(recipe, artifacts, recipe.out)
    page = Page(Path(html_path).read_text())
    assert {"scores", "run", "curves"} <= {attributes["id"] for attributes in page.of("section")}
    assert "questions" not in {attributes["id"] for attributes in page.of("section")}


def test_report_goes_to_an_object_store(
    recipe: Recipe, artifacts: list[Artifact], memory_url: str
) -> None:
    import fsspec

    html_path, json_path = report.build(recipe, artifacts, f"{memory_url}/run")
    for path in (html_path, json_path):
        assert path.startswith("memory://")
        with fsspec.open(path) as file:
            assert file.read(1) in (b"<", b"{")


def test_table_is_aligned_and_tells_of_goals() -> None:
    scores = {
        "zzz/own": Score(1234.5, 3).as_json(),
        "reconstruction/psnr": Score(23.456, 1000).as_json(),
        "qa/accuracy": Score(
            0.9134, 2000, baseline={"question_only": 0.67, "pixel_codes": 0.7}
        ).as_json()
        | {"goal": 0.9},
    }
    lines = report.table(scores, {"reconstruction/psnr": 24.0}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "qa/accuracy",
        "reconstruction/psnr",
        "zzz/own",
    ]
    assert "91.3 %" in lines[2]
    assert "question only 67.0 %, pixel codes 70.0 %" in lines[2]
    assert lines[2].endswith("90.0 % reached")
    assert lines[3].endswith("24.00 dB NOT reached")
    assert "1,234" in lines[4]
    ends = {
        line.index(mark) + len(mark)
        for line, mark in zip(lines[2:], ("2,000", "1,000", "    3"), strict=True)
    }
    assert len(ends) == 1
    assert report.table({}) == "no scores: nothing was measured"


def test_table_leaves_out_columns_that_are_empty() -> None:
    text = report.table({"codes/vrr": Score(0.1, 5).as_json()})
    assert "goal" not in text
    assert "beside" not in text


def test_goals_follow_the_direction_of_a_score() -> None:
    assert goal_met({"value": 1.0}) is None
    assert goal_met({"value": 1.0, "goal": 1.0}) is True
    assert goal_met({"value": 2.0, "goal": 1.0, "higher_is_better": False}) is False


def test_numbers_are_written_for_people() -> None:
    assert [written(0.91349, "share"), written(24.4, "dB"), written(2.0, "nats")] == [
        "91.3 %",
        "24.40 dB",
        "2.00 nats",
    ]
    assert [written(x, "plain") for x in (0.87, 13.14, 196608.0)] == ["0.870", "13.1", "196,608"]
    assert [duration(x) for x in (8.26, 59.99, 60, 245, 3599.7, 11520)] == [
        "8.3 s", "60.0 s", "1 min 00 s", "4 min 05 s", "1 h 00 min", "3 h 12 min",
    ]  # fmt: skip
    assert ordered({"b": 1, "a": 1, "codes/vrr": 1, "qa/accuracy": 1}) == [
        "qa/accuracy",
        "codes/vrr",
        "a",
        "b",
    ]


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    for low, high in (
        (0, 1),
        (-3.2, 8.9),
        (1e-6, 2e-6),
        (5, 5e6),
        (0, 2.04),
        (2.3, 2.9),
        (0.999, 1.001),
    ):
        ticks = nice_ticks(low, high)
        assert 4 <= len(ticks) <= 6
        assert all(low - 1e-9 * abs(high) <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert nice_ticks(1, 3, least_step=1) == [1, 2, 3]
    assert nice_ticks(0, 900, least_step=1) == [0, 200, 400, 600, 800]
    assert log_ticks(1, 1e4) == [1, 10, 100, 1000, 10000]
    assert log_ticks(1, 22) == [1, 2, 5, 10, 20]
    assert log_ticks(1, 256) == pytest.approx([1, 3, 10, 30, 100])
    assert tick_texts([1000.1, 1000.2, 1000.3]) == ["1.0001k", "1.0002k", "1.0003k"]
    assert [tick_text(x) for x in (0.05, 12, 1500, 3e6)] == ["0.05", "12", "1.5k", "3M"]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_every_range_has_four_to_six_ticks(low: float, width: float) -> None:
    assert 4 <= len(nice_ticks(low, low + width)) <= 6


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e12))
def test_logarithmic_ticks_are_few_and_inside(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 2 <= len(ticks) <= 6
    assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in ticks)


def test_a_first_point_far_from_the_others_does_not_flatten_the_curve() -> None:
    falling = [5.0 + 0.01 * step for step in range(50)]
    assert y_range(falling) == YRange(min(falling), max(falling))
    decades = y_range([1000.0, *(100 / step for step in range(1, 50))])
    assert decades.log and decades.note == "log scale" and decades.high == 1000
    cut = y_range([1000.0, *falling])
    assert not cut.log and cut.high < 6 and cut.note == "1 point outside, to 1k"
    assert "1 point outside, to 1k" in line_chart(
        [(float(x), y) for x, y in enumerate([1000.0, *falling])], "loss"
    )
    assert y_range([-900.0, *falling]).low > 4
    assert y_range([0.0, 5.0, 5.0]) == YRange(0.0, 5.0)


def test_charts_of_odd_data() -> None:
    assert line_chart([], "nothing") == ""
    assert line_chart([(1, float("nan"))], "nothing") == ""
    assert "polyline" in line_chart([(3, 2.0)], "one point")
    assert "polyline" in line_chart([(1, 5.0), (2, 5.0)], "constant")
    assert "&lt;b&gt;" in line_chart([(1, 1.0), (2, 2.0)], "<b>")
    assert rank_chart([(1, 0)], "unused") == ""
    assert "polygon" in rank_chart([(1, 1)], "one code used once")
    assert len(thin([(float(i), 1.0) for i in range(10_001)])) <= 400


def test_history_leaves_out_a_torn_last_line_and_no_other(tmp_path: Path) -> None:
    assert history(str(tmp_path)) == []
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert history(str(tmp_path)) == [{"step": 1}, {"step": 2}]
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(json.JSONDecodeError):
        history(str(tmp_path))
