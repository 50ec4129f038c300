"""The local cache of distant shards: fetched once, bounded, safe for several readers."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from smalti import shards, storage
from smalti.errors import DataError
from smalti.workflows.train.data import ShardRows
from smalti.workflows.train.shard_cache import ShardCache

ROWS = 50


def write(place: str, index: int, fill: int = 0) -> str:
    key = shards.shard_key("train", index)
    pad = [os.urandom(200) for _ in range(ROWS)]
    shards.write_shard(
        place, key, pa.table({"n": [1000 * index + row + fill for row in range(ROWS)], "pad": pad})
    )
    return key


def kept(folder: Path) -> list[int]:
    return [file.stat().st_size for file in folder.glob("*.parquet")]


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Paths that were fetched."""
    paths: list[str] = []
    get = storage.get_file
    monkeypatch.setattr(
        storage, "get_file", lambda path, local: (paths.append(path), get(path, local))
    )
    return paths


def test_a_shard_is_fetched_once_and_again_when_it_was_made_again(
    memory_url, tmp_path, fetched
) -> None:
    key = write(memory_url, 0)
    cache = ShardCache(str(tmp_path / "cache"), 1e9)
    for _ in range(2):
        assert cache.read(memory_url, key, ["n"]).column("n")[3].as_py() == 3
    assert len(fetched) == 1
    write(memory_url, 0, fill=7)
    assert cache.read(memory_url, key).column("n")[3].as_py() == 10 and len(fetched) == 2


def test_the_least_recently_used_leave_first(memory_url, tmp_path, fetched) -> None:
    keys = [write(memory_url, index) for index in range(4)]
    size = storage.size_bytes(shards.shard_path(memory_url, keys[0]))
    cache = ShardCache(str(tmp_path / "cache"), 2.5 * size)
    # 1 leaves for 2, 2 for 3, and then 0, not just used, for 1
    for step, index in enumerate([0, 1, 0, 2, 0, 3, 1]):
        cache.read(memory_url, keys[index])
        for file in (tmp_path / "cache").glob("*.parquet"):  # clocks of file systems are coarse
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9 * (10 - step)))
        assert sum(kept(tmp_path / "cache")) <= 2.5 * size
    assert [int(path[-13:-8]) for path in fetched] == [0, 1, 2, 3, 1]
    small = ShardCache(str(tmp_path / "small"), 1)
    assert small.read(memory_url, keys[0]).num_rows == ROWS
    assert len(kept(tmp_path / "small")) == 1


def test_what_a_kill_left_of_a_fetch_goes_and_what_is_being_fetched_counts(
    memory_url, tmp_path
) -> None:
    keys = [write(memory_url, index) for index in range(3)]
    size = storage.size_bytes(shards.shard_path(memory_url, keys[0]))
    left, coming = (
        tmp_path / f".{name}.parquet.0123456789ab.smalti-tmp" for name in ("left", "coming")
    )
    for file in (left, coming):
        file.write_bytes(bytes(size))
    os.utime(left, (0, 0))
    cache = ShardCache(str(tmp_path), 3.5 * size)
    for key in keys[:2]:
        cache.read(memory_url, key)
    assert not left.exists() and coming.exists() and len(kept(tmp_path)) == 2
    cache.read(memory_url, keys[2])
    assert coming.exists() and len(kept(tmp_path)) == 2


def test_a_damaged_copy_is_fetched_again(memory_url, tmp_path) -> None:
    key = write(memory_url, 0)
    cache = ShardCache(str(tmp_path), 1e9)
    cache.read(memory_url, key)
    (file,) = tmp_path.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    assert cache.read(memory_url, key).num_rows == ROWS
    with pytest.raises(DataError, match="train/00009"):
        cache.read(memory_url, "train/00009")


def test_readers_that_share_a_folder_do_not_trouble_each_other(memory_url, tmp_path) -> None:
    """Four readers with room for one and a half shards: whatever is removed under them, every row
    is right.
    """
    keys = [write(memory_url, index) for index in range(5)]
    size = storage.size_bytes(shards.shard_path(memory_url, keys[0]))
    wrong: list[object] = []

    def reader(start: int) -> None:
        cache = ShardCache(str(tmp_path), 1.5 * size)
        try:
            for n in range(40):
                index = (start + n * (start + 1)) % 5
                if cache.read(memory_url, keys[index]).column("n")[0].as_py() != 1000 * index:
                    wrong.append(index)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=reader, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".parquet")]


def test_rows_of_a_distant_artifact_go_through_the_cache_and_local_ones_do_not(
    memory_url, tmp_path, fetched
) -> None:
    for place in (memory_url, str(tmp_path / "here")):
        key = write(place, 0)
        rows = ShardRows(place, [key], [ROWS], ["n"])
        rows.cache_on_disk(str(tmp_path / "cache"), 1e9)
        assert rows.read(0, 4)[1] == {"n": 4}
    assert fetched == [shards.shard_path(memory_url, "train/00000")]
