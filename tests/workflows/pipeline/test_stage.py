"""run_stage: what stands is skipped, what is half-made goes on, failures are told and propagate."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from smalti import storage
from smalti.artifact import Artifact, Workspace
from smalti.errors import ArtifactError, DataError
from smalti.schema import Recipe
from smalti.tracking import NullTracker
from smalti.workflows.pipeline import stage
from smalti.workflows.pipeline.stage import StageRun, find_artifact, run_stage


class Recorder(NullTracker):
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self.children: dict[str, Recorder] = {}
        self.status: str | None = None

    def params(self, values: Any) -> None:
        self.told |= values

    def metrics(self, values: Any, step: int | None = None) -> None:
        self.told |= values

    def tags(self, values: Any) -> None:
        self.told |= values

    def child(self, name: str) -> Recorder:
        return self.children.setdefault(name, Recorder())

    def finish(self, status: Any = "FINISHED") -> None:
        self.status = status


def recipe(out: Path, **more: Any) -> Recipe:
    return Recipe.model_validate({"out": str(out), "tracking": {"uri": "off"}, **more})


def body(run: StageRun) -> dict[str, int]:
    storage.write_atomic(storage.join(run.path, "made.txt"), b"x")
    run.scores["score"] = 0.5
    return {"things": 3}


def test_a_stage_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Recorder()
    made = run_stage(recipe(tmp_path), "thing", "thing", {"a": 1}, {}, body, tracker=tracker)
    assert (made.counts, made.scores["score"]) == ({"things": 3}, 0.5)
    child = tracker.children["thing"]
    assert child.status == "FINISHED"
    assert (child.told["a"], child.told["count/things"], child.told["score"]) == (1, 3.0, 0.5)
    assert child.told["smalti.fingerprint"] == made.fingerprint

    def never(run: StageRun) -> dict[str, int]:
        raise AssertionError("made again")

    again = run_stage(recipe(tmp_path), "thing", "thing", {"a": 1}, {}, never, tracker=tracker)
    assert again.fingerprint == made.fingerprint
    said = capsys.readouterr().err
    assert "thing: starting on the recipe's source; output in" in said
    assert "thing: finished in" in said
    assert "thing: skipped: finished in" in said
    with pytest.raises(ArtifactError, match="a: 1 there, 2 here"):
        run_stage(recipe(tmp_path), "thing", "thing", {"a": 2}, {}, body, tracker=tracker)


def test_a_failure_propagates_and_the_next_try_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, resumed = Recorder(), []

    def fails(run: StageRun) -> dict[str, int]:
        storage.write_atomic(storage.join(run.path, "half"), b"x")
        raise DataError("broken")

    def goes_on(run: StageRun) -> dict[str, int]:
        resumed.append(run.resumed and storage.exists(storage.join(run.path, "half")))
        return {}

    with pytest.raises(DataError, match="broken"):
        run_stage(recipe(tmp_path), "thing", "thing", {}, {}, fails, tracker=tracker)
    assert tracker.children["thing"].status == "FAILED"
    with pytest.raises(ArtifactError, match="incomplete artifact"):
        find_artifact(recipe(tmp_path), "thing")
    run_stage(recipe(tmp_path), "thing", "thing", {}, {}, goes_on, tracker=tracker)
    assert resumed == [True]
    assert "thing: resuming on" in capsys.readouterr().err


def test_a_failure_before_anything_was_made_leaves_the_place_to_other_settings(
    tmp_path: Path,
) -> None:
    def refuses(run: StageRun) -> dict[str, int]:
        raise DataError("set a to 2")

    with pytest.raises(DataError, match="set a to 2"):
        run_stage(recipe(tmp_path), "thing", "thing", {"a": 1}, {}, refuses)
    assert run_stage(recipe(tmp_path), "thing", "thing", {"a": 2}, {}, body).config == {"a": 2}


def test_parents_change_the_fingerprint_and_nested_names_nest(tmp_path: Path) -> None:
    first = run_stage(recipe(tmp_path), "a", "a", {}, {}, body)
    other = run_stage(recipe(tmp_path / "b"), "a", "a", {"x": 1}, {}, body)
    one = run_stage(recipe(tmp_path / "1"), "t/phases/p", "p", {}, {"a": first}, body)
    two = run_stage(recipe(tmp_path / "2"), "t/phases/p", "p", {}, {"a": other}, body)
    assert one.fingerprint != two.fingerprint
    assert one.path == str(tmp_path / "1" / "t" / "phases" / "p")


def test_shared_outputs_are_used_where_the_fingerprint_is_the_same(tmp_path: Path) -> None:
    made = run_stage(recipe(tmp_path / "main"), "thing", "thing", {"a": 1}, {}, body)
    variant = recipe(tmp_path / "variant", share=[str(tmp_path / "main")])
    found = run_stage(variant, "thing", "thing", {"a": 1}, {}, body)
    assert found.path == made.path
    assert find_artifact(variant, "thing").path == made.path
    own = run_stage(
        recipe(tmp_path / "third", share=[str(tmp_path / "main")]),
        "thing",
        "thing",
        {"a": 2},
        {},
        body,
    )
    assert own.path == str(tmp_path / "third" / "thing")
    storage.remove(made.path)
    with pytest.raises(ArtifactError, match="which is missing"):
        find_artifact(variant, "thing")


def test_a_missing_parent_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact"):
        find_artifact(recipe(tmp_path), "corpus")


def test_relative_out_is_absolute_in_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = run_stage(recipe(Path("rel")), "thing", "thing", {}, {}, body)
    assert made.path == str(tmp_path / "rel" / "thing")
    assert Artifact.load(made.path).fingerprint == made.fingerprint


def test_time_that_cannot_be_noted_is_told_and_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = threading.Event()

    def full(self: Workspace, seconds: float) -> None:
        told.set()
        raise DataError("the disk is full")

    def works(run: StageRun) -> dict[str, int]:
        monkeypatch.setattr(Workspace, "beat", full)
        assert told.wait(30)
        return {"things": 1}

    monkeypatch.setattr(stage, "BEAT_S", 0.01)
    assert run_stage(recipe(tmp_path), "thing", "thing", {}, {}, works).counts == {"things": 1}
    assert "the elapsed time could not be recorded: the disk is full" in capsys.readouterr().err
