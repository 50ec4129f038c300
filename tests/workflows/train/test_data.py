"""Rows read from shards: bounded memory, prefetching, decoding, damaged shards."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from smalti import shards
from smalti.errors import DataError
from smalti.schema import (
    Train,
)
from smalti.workflows.train.batch_loader import BatchLoader
from smalti.workflows.train.data import ImageRows, ShardRows, TokenRows, shard_index
from smalti.workflows.train.order import Order


def write(place: Path, sizes: list[int]) -> tuple[list[str], list[int]]:
    for index, size in enumerate(sizes):
        table = pa.table(
            {"n": [100 * index + row for row in range(size)], "pad": [bytes(1000)] * size}
        )
        shards.write_shard(str(place), shards.shard_key("train", index), table)
    return shard_index(str(place), "train")


def test_rows_are_read_with_bounded_memory(tmp_path) -> None:
    keys, sizes = write(tmp_path, [5, 4, 6])
    assert sizes == [5, 4, 6]
    rows = ShardRows(str(tmp_path), keys, sizes, cache_bytes=9_000)
    for shard, row in [(0, 4), (1, 3), (2, 5), (0, 0)]:
        assert rows.read(shard, row)[1]["n"] == 100 * shard + row
        assert rows._bytes <= 9_000 and rows._bytes == sum(
            size for _, size, _ in rows._tables.values()
        )


class Counted(ShardRows):
    """Keeps which shards were read."""

    def prepare(self, table: pa.Table) -> None:
        self.count[int(table.column("n")[0].as_py()) // 100] += 1


def an_epoch(
    place: Path, rank: int, world_size: int, window: int = 4, **memory: float
) -> tuple[Counted, list[int], list[str]]:
    """The source after a worker's epoch (12 shards of 20 rows), the rows that it
    took in the epoch, and lines logged."""
    keys, sizes = shards.list_shards(str(place), "train"), [20] * 12
    rows = Counted(str(place), keys, sizes, cache_bytes=memory.get("cache_bytes", 0))
    lines: list[str] = []
    rows.count = Counter()
    rows.configure(Train(data_gb=memory.get("data_gb", 1)), lines.append)
    order = Order(sizes, 0, window)
    taken: list[int] = []
    feed = BatchLoader(rows, order, lambda found: {"n": [row.values["n"] for row in found]}, batch_size=20, micro=20, rank=rank,
                world_size=world_size, threads=2)  # fmt: skip
    for step, batches in feed.steps(0, 12):
        taken += batches[0]["n"]
        assert len(rows._tables) <= 2 * window, step
    assert rows._ahead is not None
    rows._ahead.shutdown()
    return rows, taken, lines


def test_each_shard_is_read_once_an_epoch_and_the_next_window_before_its_first_step(
    tmp_path,
) -> None:
    write(tmp_path, [20] * 12)
    rows, taken, lines = an_epoch(tmp_path, 0, 1)
    # of the next epoch, which is looked ahead to
    following = Order([20] * 12, 0, 4).near(12, 20, 0, 1).own
    assert Counter(range(12)) <= rows.count <= Counter([*range(12), *following])
    assert set(following) <= set(rows._tables) and len(following) == 4
    assert (
        sorted(taken) == [100 * shard + row for shard in range(12) for row in range(20)]
        and not lines
    )
    for rank in range(2):
        half, _, _ = an_epoch(tmp_path, rank, 2)
        assert half.count.total() <= 12, (
            "about half of the shards, and those at the border, and two ahead"
        )
        assert max(half.count.values()) <= 2


def test_a_window_that_does_not_fit_is_reported_once_and_part_of_it_stays(tmp_path) -> None:
    """Room for eight of the window's twelve shards: the rows are right, about four are not read
    again in a step (the least recently used, dropped first, would all be), and a line reports it.
    """
    write(tmp_path, [20] * 12)
    rows, taken, lines = an_epoch(tmp_path, 0, 1, window=12, data_gb=1.7e-4)
    assert sorted(taken) == [100 * shard + row for shard in range(12) for row in range(20)]
    assert 12 < rows.count.total() < 100, "120 shards are touched"
    assert len(lines) == 1 and "take more than train.data_gb=0.00017" in lines[0]


def test_a_shard_that_changed_meanwhile_is_an_error(tmp_path) -> None:
    keys, sizes = write(tmp_path, [5])
    shards.write_shard(str(tmp_path), keys[0], pa.table({"n": [1]}))
    with pytest.raises(DataError, match=r"holds 1 rows .* but 5"):
        ShardRows(str(tmp_path), keys, sizes).read(0, 0)


def test_an_empty_split_is_an_error(tmp_path) -> None:
    with pytest.raises(DataError, match="no rows in its 'train' split"):
        shard_index(str(tmp_path), "train")


def png(colour: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(data, "png")
    return data.getvalue()


def test_image_rows_decode_once_and_name_what_is_damaged(tmp_path, monkeypatch) -> None:
    table = pa.table(
        {"image_id": ["good", "bad"], "image": [png((255, 0, 10)), png((1, 2, 3))[:40]]}
    )
    shards.write_shard(str(tmp_path), "train/00000", table)
    rows = ImageRows(str(tmp_path), ["train/00000"], [2], 4, max_pixels=100, text=())
    _, values = rows.read(0, 0)
    assert values["pixels"].shape == (4, 4, 3) and tuple(values["pixels"][0, 0]) == (255, 0, 10)
    monkeypatch.setattr("smalti.images.to_pixels", lambda *a, **k: pytest.fail("decoded twice"))
    assert rows.read(0, 0)[1] is values
    monkeypatch.undo()
    with pytest.raises(DataError, match="image bad in shard train/00000"):
        rows.read(0, 1)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
def test_token_rows_give_codes(tmp_path, shape) -> None:
    """Of one axis, or of those that DualToken gives."""
    codes = np.arange(12, dtype=np.int32).reshape(2, *shape)
    columns = [["a", "b"], shards.list_column(codes), [None, "c"], [None, None], [[], []]]
    schema = shards.token_schema(shape)
    by_name = dict(zip(["image_id", "codes", "caption", "label", "qa"], columns, strict=True))
    shards.write_shard(
        str(tmp_path), "train/00000", pa.table([by_name[n] for n in schema.names], schema)
    )
    _, values = TokenRows(str(tmp_path), ["train/00000"], [2]).read(0, 1)
    assert values["codes"].tolist() == codes[1].tolist() and values["caption"] == "c"
