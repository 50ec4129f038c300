"""report.json and report.html are written, whatever parts a run has.

Covers: workflows/report/__init__.py, workflows/report/machine.py.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from smalti.artifact import Artifact
from smalti.config import with_overrides
from smalti.schema import Recipe
from smalti.workflows import report
from tests.workflows.report.example_run import NASTY, Page


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
    # the work, which is longer than the command
    assert found["seconds"] == pytest.approx(2 + 40 + 100 + 9 + 90, abs=1)
    assert [stage["name"] for stage in found["stages"]] == [
        "corpus", "tokenizer", "mllm", "evaluate", "baselines/pixel_codes/mllm",
    ]  # fmt: skip
    assert all(set(stage) == {"name", "seconds", "artifact"} for stage in found["stages"])
    assert Path(found["stages"][0]["artifact"]).is_dir()
    for score in found["scores"].values():
        assert set(score) == {"value", "n", "split", "higher_is_better", "baseline"}
    assert found["scores"]["qa/accuracy"]["baseline"] == {"question_only": 0.67}


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
