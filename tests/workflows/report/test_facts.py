"""Facts of a run: its time, its evaluation, its training histories."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from smalti.artifact import Artifact
from smalti.schema import Recipe
from smalti.workflows import report
from smalti.workflows.report.facts import history
from tests.workflows.report.example_run import Page, evaluation


def test_wall_time_counts_where_it_is_longer(recipe: Recipe, artifacts: list[Artifact]) -> None:
    _, json_path = report.build(recipe, artifacts, recipe.out, started=time.time() - 3600)
    assert json.loads(Path(json_path).read_text())["seconds"] == pytest.approx(3600, abs=60)


def test_an_evaluation_in_the_folder_of_earlier_versions_is_reported(
    recipe: Recipe, tmp_path: Path
) -> None:
    html_path, json_path = report.build(recipe, [evaluation(tmp_path, "evaluation")], recipe.out)
    assert len(Page(Path(html_path).read_text()).of("img")) == 6
    assert json.loads(Path(json_path).read_text())["scores"]["qa/accuracy"]["value"] == 0.92


def test_history_leaves_out_a_torn_last_line_and_no_other(tmp_path: Path) -> None:
    assert history(str(tmp_path)) == []
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert history(str(tmp_path)) == [{"step": 1}, {"step": 2}]
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(json.JSONDecodeError):
        history(str(tmp_path))
