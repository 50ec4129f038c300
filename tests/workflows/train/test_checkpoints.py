"""Checkpoints in storage: what is removed, fetched and retried, here and in an object store."""

from __future__ import annotations

import os

import pytest

from smalti import storage
from smalti.errors import DataError
from smalti.workflows.pipeline import retry as retries
from smalti.workflows.train import checkpoints
from smalti.workflows.train.checkpoint_policy import CheckpointPolicy
from smalti.workflows.train.checkpoints import Checkpoints, fetched
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.manifests import (
    CompleteCheckpoint,
    inspect_checkpoint,
    newest_complete,
    step_folder,
)
from smalti.workflows.train.scratch import Scratch
from tests.workflows.train.planted_checkpoints import plant


def test_dropping_leaves_what_is_being_written(place) -> None:
    for step, score in ((5, 1.0), (10, 2.0), (15, 3.0)):
        plant(place, step, score=score)
    for step in (7, 20):
        storage.remove(storage.join(plant(place, step), "task.pt"))
    Checkpoints(
        place, Collectives(), CheckpointPolicy(keep=1, best="loss")
    ).remove_old_checkpoints()
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
        newest_complete(place, print)
    found = retries.retry_storage(newest_complete, place, print)
    assert found is not None and found.step == 10
    retries.retry_storage(
        Checkpoints(place, Collectives(), CheckpointPolicy(keep=2)).remove_old_checkpoints
    )
    assert storage.list_names(place) == [step_folder(5), step_folder(10)] and not away


def test_a_worker_fetches_its_own_files_and_those_for_all(memory_url) -> None:
    found = inspect_checkpoint(plant(memory_url, 5, world_size=3))
    assert isinstance(found, CompleteCheckpoint)
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


def test_no_room_on_a_workers_own_disk_is_an_error_with_its_fix(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:5] x"),
    ):
        with (
            pytest.raises(DataError, match=rf"checkpoint to {tmp_path}: .* set TMPDIR"),
            checkpoints._local_folder(),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="Connection closed by peer"),
        checkpoints._local_folder(),
    ):
        raise RuntimeError("Connection closed by peer")
    assert not list(tmp_path.iterdir())


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


def test_retries_of_sending_are_logged_by_the_worker_that_sends(
    place, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    put = storage.put_file
    failures = [True]

    def sometimes(source: str, target: str) -> None:
        if failures and failures.pop():
            raise DataError("cannot write") from ConnectionResetError()
        put(source, target)

    monkeypatch.setattr(storage, "put_file", sometimes)
    for_all: list[str] = []
    own: list[str] = []
    written = Checkpoints(
        place, Collectives(), CheckpointPolicy(), say=for_all.append, say_own=own.append
    )
    scratch = Scratch("checkpoint")
    (tmp_path / os.path.basename(scratch.path) / "task.pt").write_bytes(b"task")
    written._send(scratch, storage.join(place, step_folder(5)), None)
    assert isinstance(inspect_checkpoint(storage.join(place, step_folder(5))), CompleteCheckpoint)
    assert not for_all and len(own) == 1 and "try 1 of 6" in own[0]
