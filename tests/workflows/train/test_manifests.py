"""Which checkpoint folders are complete: planted ones, on disk and in an object store."""

from __future__ import annotations

import pytest

from smalti import storage
from smalti.workflows.train.manifests import (
    inspect_checkpoint,
    manifest_name,
    newest_complete,
)
from tests.workflows.train.planted_checkpoints import plant


def test_the_newest_whole_checkpoint_is_chosen(place) -> None:
    assert newest_complete(place, print) is None
    for step in (5, 10, 100):
        plant(place, step)
    lines: list[str] = []
    found = newest_complete(place, lines.append)
    assert found is not None and found.step == 100 and not lines
    assert found.files == (("model/engine/rank0.pt", "task.pt"), ("model/engine/rank1.pt",))


@pytest.mark.parametrize(
    "harm",
    ["missing", "truncated", "manifest", "torn manifest", "other manifest", "no manifest at all"],
)
def test_a_torn_checkpoint_is_skipped_with_a_line(place, harm: str) -> None:
    plant(place, 5)
    path = plant(place, 10)
    file = storage.join(path, "model/engine/rank1.pt")
    if harm == "missing":
        storage.remove(file)
        wrong = "model/engine/rank1.pt is missing"
    elif harm == "truncated":
        storage.write_atomic(file, b"mod")
        wrong = "model/engine/rank1.pt has 3 of 27 bytes"
    elif harm in ("torn manifest", "other manifest"):
        left = (
            b'{"world_si'
            if harm == "torn manifest"
            else b'{"world_sizd": 2, "score": null, "files": {}}'
        )
        storage.write_atomic(storage.join(path, "manifest-00001.json"), left)
        wrong = "manifest-00001.json is damaged"
    else:
        ranks = [1] if harm == "manifest" else [0, 1]
        for rank in ranks:
            storage.remove(storage.join(path, manifest_name(rank)))
        wrong = f"{manifest_name(ranks[0])} is missing"
    lines: list[str] = []
    found = newest_complete(place, lines.append)
    assert found is not None and found.step == 5
    assert lines == [f"skipping the incomplete checkpoint {path}: {wrong}"]


def test_a_manifest_that_disappears_after_the_listing_is_reported_as_missing(
    place, monkeypatch
) -> None:
    path = plant(place, 5)
    sizes = storage.sizes_bytes(path)
    storage.remove(storage.join(path, "manifest-00000.json"))
    monkeypatch.setattr(storage, "sizes_bytes", lambda folder: sizes)
    assert inspect_checkpoint(path) == "manifest-00000.json is missing"
