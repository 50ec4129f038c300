"""Which checkpoint is whole, which is chosen, which are kept: on planted folders, here and in an
object store.

Covers: workflows/train/reshard.py, workflows/train/scratch.py.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from smalti import storage
from smalti.errors import ConfigError, DataError, TrainingError
from smalti.workflows.pipeline import retry as retries
from smalti.workflows.train import checkpoints, reshard
from smalti.workflows.train.checkpoints import (
    Checkpoints,
    Whole,
    fetched,
    look,
    newest,
    step_folder,
    to_drop,
)
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.scratch import Scratch, sweep


def plant(place: str, step: int, *, score: float | None = None, world_size: int = 2) -> str:
    """A whole checkpoint of two workers."""
    path = storage.join(place, step_folder(step))
    for rank in range(world_size):
        names = [f"model/engine/rank{rank}.pt"] + (["task.pt"] if rank == 0 else [])
        for name in names:
            storage.write_atomic(storage.join(path, name), f"{name} of {step}".encode())
        sizes = {name: len(f"{name} of {step}") for name in names}
        manifest = {"world_size": world_size, "score": score, "files": sizes}
        storage.write_json(storage.join(path, checkpoints.manifest_name(rank)), manifest)
    return path


def test_the_newest_whole_checkpoint_is_chosen(place) -> None:
    assert newest(place, print) is None
    for step in (5, 10, 100):
        plant(place, step)
    lines: list[str] = []
    found = newest(place, lines.append)
    assert found is not None and found.step == 100 and not lines
    assert found.files == (("model/engine/rank0.pt", "task.pt"), ("model/engine/rank1.pt",))


@pytest.mark.parametrize(
    "harm",
    ["missing", "truncated", "manifest", "torn manifest", "other manifest", "no manifest at all"],
)
def test_a_torn_checkpoint_is_passed_over_with_a_line(place, harm: str) -> None:
    plant(place, 5)
    path = plant(place, 10)
    file = storage.join(path, "model/engine/rank1.pt")
    if harm == "missing":
        storage.remove(file)
        told = "model/engine/rank1.pt is missing"
    elif harm == "truncated":
        storage.write_atomic(file, b"mod")
        told = "model/engine/rank1.pt holds 3 bytes of 27"
    elif harm in ("torn manifest", "other manifest"):
        left = (
            b'{"world_si'
            if harm == "torn manifest"
            else b'{"world_sizd": 2, "score": null, "files": {}}'
        )
        storage.write_atomic(storage.join(path, "manifest-00001.json"), left)
        told = "its manifest-00001.json is torn"
    else:
        ranks = [1] if harm == "manifest" else [0, 1]
        for rank in ranks:
            storage.remove(storage.join(path, checkpoints.manifest_name(rank)))
        told = f"it has no {checkpoints.manifest_name(ranks[0])}"
    lines: list[str] = []
    found = newest(place, lines.append)
    assert found is not None and found.step == 5
    assert lines == [f"checkpoint {path} is passed over: {told}"]


def made(*scores: float | None) -> list[Whole]:
    return [Whole(step, str(step), (), score) for step, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ([3.0, 1.0, 2.0, 4.0], None, [2, 3]),
        ([3.0, 1.0, 2.0, 4.0], "loss", [1, 2, 3]),
        ([3.0, 1.0, 2.0, 1.5], "max:psnr", [0, 2, 3]),
        ([3.0, 4.0, 2.0, 1.0], "loss", [2, 3]),
        ([None, float("nan"), 2.0, 1.0], "loss", [2, 3]),
        ([1.0], "loss", [0]),
    ],
)
def test_the_newest_and_the_best_are_kept(scores, best, kept) -> None:
    whole = made(*scores)
    dropped = {c.step for c in to_drop(whole, 2, best)}
    assert [c.step for c in whole if c.step not in dropped] == kept


def test_the_best_is_told_by_a_metric_that_is_logged() -> None:
    rows = [{"step": 4, "loss": 2.0, "psnr": 20.0}, {"step": 8, "loss": 1.5}]
    score = lambda best, rows: Checkpoints("x", Collectives(), best=best)._score({"history": rows})  # noqa: E731
    assert (score("loss", rows), score("max:psnr", rows), score(None, rows), score("loss", [])) == (
        1.5,
        20.0,
        None,
        None,
    )
    checkpoints.check_best("max:psnr", ["loss", "psnr"])
    with pytest.raises(ConfigError, match=r"train.best=los names no metric .* it logs loss, psnr"):
        checkpoints.check_best("los", ["psnr", "loss"])


def test_dropping_leaves_what_is_being_written(place) -> None:
    for step, score in ((5, 1.0), (10, 2.0), (15, 3.0)):
        plant(place, step, score=score)
    for step in (7, 20):
        storage.remove(storage.join(plant(place, step), "task.pt"))
    Checkpoints(place, Collectives(), keep=1, best="loss")._drop()
    assert storage.list_names(place) == [step_folder(step) for step in (5, 15, 20)]


def test_storage_that_does_not_answer_makes_no_checkpoint_torn(place, monkeypatch) -> None:
    """It is looked at again: neither is one before it taken, nor is it removed as not whole."""
    for step in (5, 10):
        plant(place, step)
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    read, away = storage.read_bytes, [True, True, False, True]

    def sometimes(path: str) -> bytes:
        if path.endswith("manifest-00001.json") and away and away.pop(0):
            raise DataError(f"cannot read {path}: the network is down") from TimeoutError()
        return read(path)

    monkeypatch.setattr(storage, "read_bytes", sometimes)
    with pytest.raises(DataError, match="network"):
        newest(place, print)
    found = retries.retry_storage(newest, place, print)
    assert found is not None and found.step == 10
    retries.retry_storage(Checkpoints(place, Collectives(), keep=2)._drop)
    assert storage.list_names(place) == [step_folder(5), step_folder(10)] and not away


def test_a_manifest_that_disappears_after_the_listing_is_reported_as_missing(
    place, monkeypatch
) -> None:
    path = plant(place, 5)
    sizes = storage.sizes_bytes(path)
    storage.remove(storage.join(path, "manifest-00000.json"))
    monkeypatch.setattr(storage, "sizes_bytes", lambda folder: sizes)
    assert look(path) == "it has no manifest-00000.json"


def test_a_worker_fetches_its_own_files_and_those_for_all(memory_url) -> None:
    found = look(plant(memory_url, 5, world_size=3))
    assert isinstance(found, Whole)
    third = Collectives()
    third.rank, third.world_size = 2, 3
    with fetched(found, third, print) as folder:
        assert sorted(storage.sizes_bytes(folder)) == [
            "model/engine/rank0.pt",
            "model/engine/rank2.pt",
            "task.pt",
        ]
    with fetched(found, Collectives(), print) as folder:
        assert len(storage.sizes_bytes(folder)) == 4
    assert not storage.exists(folder)


def test_an_engine_that_does_not_load_is_one_error_and_a_lost_connection_stays_what_it_is(
    monkeypatch,
) -> None:
    def engine(error: Exception) -> SimpleNamespace:
        return SimpleNamespace(load_checkpoint=lambda folder, tag: (_ for _ in ()).throw(error))

    with pytest.raises(
        TrainingError, match=r"the checkpoint s3://x/step-5/model \(AssertionError: no files\)"
    ):
        reshard.load_engine(
            engine(AssertionError("no files")), "here", "tag", told="s3://x/step-5/model"
        )
    with pytest.raises(TrainingError, match="it is not there"):
        reshard.load_engine(
            SimpleNamespace(load_checkpoint=lambda *a, **k: (None, {})), "here", "tag", told="x"
        )
    with pytest.raises(RuntimeError, match="Connection closed"):
        reshard.load_engine(
            engine(RuntimeError("Connection closed by peer")), "here", "tag", told="x"
        )

    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:5] x"),
    ):
        full = SimpleNamespace(main=lambda asked, error=error: (_ for _ in ()).throw(error))
        monkeypatch.setitem(
            sys.modules, "deepspeed.checkpoint", SimpleNamespace(ds_to_universal=full)
        )
        with pytest.raises(TrainingError, match=r"room there for all weights .* set TMPDIR"):
            reshard._convert("here", "there", "x")


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = Scratch("checkpoint")
    for name in (
        "smalti-scratch-resume-left",
        "smalti-scratch-universal-left/zero",
        "smalti-other",
        "not-ours",
    ):
        (tmp_path / name).mkdir(parents=True)
    sweep()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["not-ours", "smalti-other", os.path.basename(held.path)]
    held.remove()
    assert not os.path.exists(held.path)


def test_storage_that_fails_for_a_moment_is_tried_again(monkeypatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", paused.append)
    calls: list[int] = []

    def flaky(times: int) -> str:
        calls.append(times)
        if len(calls) <= times:
            raise DataError("not now") from ConnectionResetError()
        return "done"

    assert retries.retry_storage(flaky, len(retries.STORAGE_PAUSES_S)) == "done"
    assert len(calls) == (len(retries.STORAGE_PAUSES_S) + 1) and paused == [2, 4, 8, 16, 32]
    calls.clear()
    with pytest.raises(DataError, match="not now"):
        retries.retry_storage(flaky, 99)
    assert len(calls) == (len(retries.STORAGE_PAUSES_S) + 1)


def test_no_room_on_a_workers_own_disk_is_an_error_with_its_mend(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:5] x"),
    ):
        with (
            pytest.raises(DataError, match=rf"checkpoint to {tmp_path}: .* set TMPDIR"),
            checkpoints._made_here(),
        ):
            raise error
    with pytest.raises(RuntimeError, match="Connection closed by peer"), checkpoints._made_here():
        raise RuntimeError("Connection closed by peer")
    assert not list(tmp_path.iterdir())
