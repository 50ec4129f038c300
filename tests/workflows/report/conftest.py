"""A finished run, for the tests of its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti import artifact
from smalti.artifact import Artifact
from smalti.config import with_overrides
from smalti.schema import Recipe
from tests.workflows.report.example_run import NASTY, evaluation, finish, write_history


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
