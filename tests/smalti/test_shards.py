from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smalti import shards, storage
from smalti.errors import DataError

QA = [{"question": "is it red?", "answer": "yes"}]


def corpus_table(rows: int = 3) -> pa.Table:
    data: list[dict[str, Any]] = [
        {
            "image_id": f"{i:04d}", "image": bytes([i]) * 50, "width": 4, "height": 5, "caption": "a shape" if i else None,
            "label": None, "source": "x", "qa": QA if i else [],
        }
        for i in range(rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(data, schema=shards.CORPUS)


def feature_table(vectors: np.ndarray) -> pa.Table:
    columns = [
        pa.array([f"{i // 4}" for i in range(len(vectors))]),
        pa.array(np.arange(len(vectors), dtype=np.int32) % 4),
        shards.list_column(vectors),
    ]
    return pa.Table.from_arrays(columns, schema=shards.feature_schema(vectors.shape[1]))


def token_table(codes: np.ndarray) -> pa.Table:
    rows = len(codes)
    columns = [
        pa.array([str(i) for i in range(rows)]),
        shards.list_column(codes),
        pa.array(["c"] * rows),
        pa.array([None] * rows, pa.string()),
        pa.array([QA] * rows, shards.QA),
    ]
    return pa.Table.from_arrays(columns, schema=shards.token_schema(codes.shape[1:]))


def test_corpus_rows_come_back_as_they_were(place: str) -> None:
    table = corpus_table()
    key = shards.shard_key("train", 12)
    receipt = shards.write_shard(place, key, table)
    assert (receipt.key, receipt.rows) == ("train/00012", 3)
    assert receipt.size_bytes == storage.size_bytes(f"{place}/train/00012.parquet")
    assert shards.read_shard(place, key).equals(table, check_metadata=True)
    assert shards.read_shard(place, key, ["caption", "image_id"]).column("caption").to_pylist() == [
        None,
        "a shape",
        "a shape",
    ]
    assert shards.shard_rows(place, key) == 3


def test_other_readers_of_parquet_can_read_a_shard(tmp_path: Any) -> None:
    shards.write_shard(str(tmp_path), "train/00000", corpus_table())
    shards.write_shard(
        str(tmp_path), "val/00000", token_table(np.arange(12, dtype=np.int32).reshape(3, 4))
    )
    assert pq.read_table(tmp_path / "train" / "00000.parquet").equals(corpus_table())
    assert pq.read_table(tmp_path / "val" / "00000.parquet").column("codes").to_pylist()[2] == [
        8,
        9,
        10,
        11,
    ]


@given(hnp.arrays(np.float16, st.tuples(st.integers(0, 20), st.integers(1, 9))))
@settings(max_examples=40, deadline=None)
def test_vectors_come_back_bit_by_bit(vectors: np.ndarray) -> None:
    root = "memory://smalti-shards"
    shards.write_shard(root, "train/00000", feature_table(vectors))
    table = shards.read_shard(root, "train/00000")
    assert table.schema.equals(shards.feature_schema(vectors.shape[1]))
    seen = shards.vectors(table)
    assert seen.dtype == np.float16
    assert seen.shape == vectors.shape
    assert seen.tobytes() == vectors.tobytes()  # NaN and -0.0 too
    storage.remove(root)


def test_vectors_are_not_copied(place: str) -> None:
    shards.write_shard(place, "train/00000", feature_table(np.ones((8, 16), np.float16)))
    table = shards.read_shard(place, "train/00000", ["vector"])
    data = table.column("vector").chunk(0).flatten().buffers()[1]
    assert shards.vectors(table).__array_interface__["data"][0] == data.address


def test_slices_and_chunks_of_vectors() -> None:
    vectors = np.arange(60, dtype=np.float16).reshape(10, 6)
    table = feature_table(vectors)
    assert np.array_equal(shards.vectors(table.slice(3, 4)), vectors[3:7])
    assert np.array_equal(
        shards.vectors(pa.concat_tables([table.slice(0, 2), table.slice(5)])),
        np.concatenate([vectors[:2], vectors[5:]]),
    )
    assert shards.vectors(table.slice(0, 0)).shape == (0, 6)
    shards.write_shard("memory://smalti-slices", "train/00000", table.slice(3, 4))
    assert np.array_equal(
        shards.vectors(shards.read_shard("memory://smalti-slices", "train/00000")), vectors[3:7]
    )
    storage.remove("memory://smalti-slices")


@pytest.mark.parametrize("shape", [(5,), (4, 2, 3)])
def test_codes_keep_their_shape(place: str, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, 200_000, (7, *shape), dtype=np.int32)
    shards.write_shard(place, "val/00003", token_table(codes))
    table = shards.read_shard(place, "val/00003")
    assert np.array_equal(shards.codes(table), codes)
    assert np.array_equal(shards.codes(table.slice(2, 3)), codes[2:5])
    assert table.column("qa").to_pylist()[0] == QA


def test_shards_are_listed_in_order_without_what_is_none(place: str) -> None:
    for key in ("val/00000", "train/00002", "train/00010", "train/100000", "quarantine/00000"):
        shards.write_shard(place, key, corpus_table(1))
    storage.write_atomic(f"{place}/train/notes.txt", b"")
    assert shards.list_shards(place, "train") == ["train/00002", "train/00010", "train/100000"]
    assert shards.list_shards(place) == ["train/00002", "train/00010", "train/100000", "val/00000"]
    assert shards.list_shards(place, "quarantine") == ["quarantine/00000"]
    assert shards.list_shards(f"{place}/none") == []


@pytest.mark.parametrize("cut", [0, 1, 10, 200, -1, -9])
def test_a_torn_shard_is_named(place: str, cut: int) -> None:
    shards.write_shard(place, "train/00000", corpus_table())
    path = shards.shard_path(place, "train/00000")
    storage.write_atomic(path, storage.read_bytes(path)[:cut])
    for read in (shards.read_shard, shards.shard_rows):
        with pytest.raises(DataError, match=r"train/00000\.parquet is not a complete Parquet file"):
            read(place, "train/00000")


def test_damaged_pages_are_told(place: str) -> None:
    shards.write_shard(place, "train/00000", feature_table(np.ones((64, 64), np.float16)))
    path = shards.shard_path(place, "train/00000")
    data = bytearray(storage.read_bytes(path))
    data[4:40] = bytes(36)
    storage.write_atomic(path, data)
    with pytest.raises(DataError, match="not a complete Parquet file"):
        shards.read_shard(place, "train/00000")


def test_missing_shards_and_columns_are_named(place: str) -> None:
    with pytest.raises(DataError, match=r"train/00009\.parquet"):
        shards.read_shard(place, "train/00009")
    shards.write_shard(place, "train/00000", corpus_table())
    with pytest.raises(DataError, match="no column colour; it has image_id, image"):
        shards.read_shard(place, "train/00000", ["colour"])
    with pytest.raises(DataError, match="no column 'vector'"):
        shards.vectors(corpus_table())


def test_nulls_among_vectors_are_refused() -> None:
    column = pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2))
    with pytest.raises(DataError, match="1 nulls"):
        shards.vectors(pa.table({"vector": column}))
