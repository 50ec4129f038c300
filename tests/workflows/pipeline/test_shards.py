"""The shard pipeline: every item once, with and without a stage of readers, through errors and lost
actors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smalti.errors import ConfigError, DataError, ImageError
from smalti.schema import Resources
from smalti.workflows.pipeline import shards as shard_pipeline
from smalti.workflows.pipeline.shards import _pack, _unpack, run_shards
from smalti.workflows.pipeline.timings import Tally

pytestmark = pytest.mark.ray


def worker_class(folder: str = "") -> Any:
    """A worker that squares; made here, so that it travels by value.

    Given a folder it dies once at item 5, and always at item 6.
    """

    class Square:
        def __init__(self, offset: int) -> None:
            self.offset = offset

        def read(self, item: int) -> tuple[int, bytes]:
            if item == -1:
                raise ImageError("cannot read", "broken")
            return item, bytes(1000)

        def work(self, loaded: tuple[int, bytes]) -> int:
            import os
            import signal
            from pathlib import Path

            item, data = loaded
            marker = Path(folder) / "died"
            if folder and item == 5 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if folder and item == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            if item == -2:
                raise ValueError("a bug")
            return item * item + self.offset + len(data) - 1000

    return Square


def results(
    items: list[int], gpus: float, folder: str = "", tally: Tally | None = None
) -> list[int]:
    resources = Resources(actors=2, gpus_per_worker=gpus, readers=1)
    return sorted(run_shards(items, worker_class(folder), (7,), resources, tally=tally))


@pytest.mark.parametrize("gpus", [0, 0.5])
def test_every_item_once(on_ray_with_gpu: None, gpus: float) -> None:
    assert results(list(range(9)), gpus) == sorted(n * n + 7 for n in range(9))


@pytest.mark.parametrize("gpus", [0, 0.5])
def test_a_users_error_comes_as_it_was(on_ray_with_gpu: None, gpus: float) -> None:
    with pytest.raises(ImageError, match="cannot read") as caught:
        results([1, -1], gpus)
    assert caught.value.reason == "broken"


def test_a_bug_is_not_swallowed(on_ray_with_gpu: None) -> None:
    with pytest.raises(Exception, match="a bug"):
        results([-2], 0)


def test_gpus_that_this_machine_has_not_are_not_waited_for(on_ray_with_gpu: None) -> None:
    with pytest.raises(
        ConfigError, match="gpus_per_worker=2, and Ray knows of 1 GPUs on this machine"
    ):
        results([1], 2)


def test_the_shard_of_a_lost_actor_is_done_again(on_ray_with_gpu: None, tmp_path: Path) -> None:
    tally = Tally()
    items = [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert results(items, 0, str(tmp_path), tally) == sorted(n * n + 7 for n in items)
    assert (tmp_path / "died").exists()
    assert tally.counted() == {"restarts": 1}


def test_an_item_that_kills_its_workers_is_one_clear_error(
    on_ray_with_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pipeline, "DEATHS", 1)
    with pytest.raises(
        DataError,
        match=r"1 workers died on 6: .*resources\.actors.*remove a file that crashes its reader from the source",
    ):
        results([6], 0, str(tmp_path))


def test_a_large_array_travels_beside_the_pickle() -> None:
    pixels, small = np.arange(2**20, dtype=np.uint8).reshape(4, -1), np.arange(3)
    block = _pack("loaded", ("key", small, pixels, pixels[:2]), {"seconds/read": 1.5})
    kind, (key, few, many, _), noted = _unpack(block)
    assert (kind, key, noted) == ("loaded", "key", {"seconds/read": 1.5})
    assert many.ctypes.data == pixels.ctypes.data
    np.testing.assert_array_equal(few, small)
    assert _unpack(_pack("result", 3, {}))[1] == 3


def test_nothing_to_do_starts_nothing() -> None:
    assert list(run_shards([], worker_class(), (0,), Resources())) == []
