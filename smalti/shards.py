"""Shards: Parquet files of about 1,000 images, the unit of work, and their Arrow schemas.

Layout of an artifact: `train/00012.parquet`, `val/00000.parquet`, `quarantine/00012.parquet`. A
shard has the same key (`train/00012`) in corpus, features and tokens, so that joins are by key.

Feature vectors are fixed-size lists of float16 in memory, and fixed-size binaries in the file:
Parquet decodes lists value by value, binaries by copying (`bench` goal 10). `read_shard` returns
the lists without a copy.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smalti import storage
from smalti.errors import DataError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
_SHAPE = b"smalti.shape"
_PACKED = b"smalti.float16"

QA = pa.list_(pa.struct([pa.field("question", pa.string()), pa.field("answer", pa.string())]))

CORPUS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("label", pa.string()),
        pa.field("source", pa.string()),
        pa.field("qa", QA),
    ]
)
QUARANTINE = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("key", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


def token_schema(shape: Sequence[int]) -> pa.Schema:
    """Schema of token shards.

    Args:
        shape: shape of the codes of an image, (T,) or (T, 2, D); `codes` restores it.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("codes", pa.list_(pa.int32(), math.prod(shape)), nullable=False),
            pa.field("caption", pa.string()),
            pa.field("label", pa.string()),
            pa.field("qa", QA),
        ],
        metadata={_SHAPE: json.dumps([int(n) for n in shape]).encode()},
    )


def feature_schema(dim: int) -> pa.Schema:
    """Schema of feature shards, one row per patch.

    Args:
        dim: width of `vector`, float16. `patch` is the index in the grid of the image.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("patch", pa.int32(), nullable=False),
            pa.field("vector", pa.list_(pa.float16(), dim), nullable=False),
        ]
    )


@dataclass(frozen=True)
class Receipt:
    """Key, rows and size of a written shard."""

    key: str
    rows: int
    size_bytes: int


def shard_key(split: str, index: int) -> str:
    """`train/00012`."""
    return f"{split}/{index:05d}"


def shard_path(artifact_path: str, key: str) -> str:
    """The file of the shard `key`."""
    return storage.join(artifact_path, f"{key}.parquet")


def list_shards(artifact_path: str, split: Split | str | None = None) -> list[str]:
    """Keys of the shards of `split` (None: train, then val), in the order of their index."""
    keys = []
    for name in SPLITS if split is None else (split,):
        stems = [
            file.removesuffix(".parquet")
            for file in storage.list_names(storage.join(artifact_path, name), ".parquet")
        ]
        keys += [f"{name}/{stem}" for stem in sorted(stems, key=lambda stem: (len(stem), stem))]
    return keys


def write_shard(artifact_path: str, key: str, table: pa.Table) -> Receipt:
    """Write `table` as the shard `key`, atomically; an existing one is replaced."""
    packed = _pack(table)
    plain = [field.name for field in packed.schema if _is_plain(field)]
    path = shard_path(artifact_path, key)
    with storage.atomic_file(path) as temp:
        pq.write_table(
            packed,
            temp,
            compression={name: "none" if name in plain else "zstd" for name in packed.schema.names},
            use_dictionary=[name for name in packed.schema.names if name not in plain],
            write_statistics=False,
            use_compliant_nested_type=False,
            row_group_size=max(1, packed.num_rows),
        )
        size = os.path.getsize(temp)
    return Receipt(key, table.num_rows, size)


def read_shard(artifact_path: str, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a shard, or some of its columns.

    Raises:
        DataError: if it or a column is missing, or it is damaged.
    """
    path = shard_path(artifact_path, key)
    with _opened(path) as parquet:
        missing = sorted(set(columns or ()) - set(parquet.schema_arrow.names))
        if missing:
            have = ", ".join(parquet.schema_arrow.names)
            raise DataError(f"{path} has no column {', '.join(missing)}; it has {have}")
        table = parquet.read(columns=None if columns is None else list(columns), use_threads=False)
    return _unpack(table)


def shard_rows(artifact_path: str, key: str) -> int:
    """Number of rows, from the footer; `DataError` if it cannot be read."""
    with _opened(shard_path(artifact_path, key)) as parquet:
        return int(parquet.metadata.num_rows)


def vector_shape(artifact_path: str, key: str) -> tuple[int, int]:
    """Number of rows and width of the vectors of a feature shard, from its footer.

    Raises:
        DataError: if it has no vectors, is missing or damaged.
    """
    path = shard_path(artifact_path, key)
    with _opened(path) as parquet:
        names = parquet.schema_arrow.names
        field = parquet.schema_arrow.field("vector") if "vector" in names else None
        packed = (field.metadata or {}).get(_PACKED) if field is not None else None
        if field is None or (packed is None and not pa.types.is_fixed_size_list(field.type)):
            have = (
                f"a column 'vector' of {field.type}"
                if field is not None
                else f"columns {', '.join(names)}"
            )
            raise DataError(
                f"{path} has {have}, expected vectors: remove it and run the stage features again"
            )
        return int(parquet.metadata.num_rows), int(packed or field.type.list_size)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, memory-mapped if local; errors become `DataError`."""
    with storage.open_read(path) as file:
        try:
            source = pa.memory_map(storage.local_path(path)) if storage.is_local(path) else file
            with pq.ParquetFile(source) as parquet:
                yield parquet
        except (pa.ArrowException, OSError, EOFError) as error:
            raise _damaged(path, error) from error


def vectors(table: pa.Table) -> np.ndarray:
    """Column `vector` as float16 (rows, dim); no copy if it is one chunk."""
    return _matrix(table, "vector")


def codes(table: pa.Table) -> np.ndarray:
    """Column `codes` as int32 (rows, *shape), with the shape of `token_schema`."""
    flat = _matrix(table, "codes")
    shape = (table.schema.metadata or {}).get(_SHAPE)
    return flat.reshape(len(flat), *json.loads(shape)) if shape else flat


def bytes_column(data: Sequence[bytes]) -> pa.ChunkedArray:
    """A binary column of byte strings, without a copy."""
    lengths = [np.array([0, len(one)], np.int32) for one in data]
    chunks = [
        pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(one)])
        for ends, one in zip(lengths, data, strict=True)
    ]
    return pa.chunked_array(chunks, pa.binary())


def list_column(matrix: np.ndarray) -> pa.FixedSizeListArray:
    """A (rows, n…) array as a column of fixed-size lists; no copy if it is contiguous."""
    flat = (
        np.ascontiguousarray(matrix).reshape(len(matrix), -1)
        if len(matrix)
        else matrix.reshape(0, math.prod(matrix.shape[1:]))
    )
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        raise DataError(f"the table has no column {name!r}; it has {', '.join(table.column_names)}")
    column = table.column(name)
    if column.null_count or not pa.types.is_fixed_size_list(column.type):
        raise DataError(
            f"column {name!r} is {column.type} with {column.null_count} nulls, expected lists of "
            "one size without nulls"
        )
    width = column.type.list_size
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array.flatten().to_numpy(zero_copy_only=True).reshape(len(array), width)


def _is_plain(field: pa.Field) -> bool:
    """Whether compression and dictionaries do not help: encoded images and vectors."""
    return (
        pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or pa.types.is_fixed_size_binary(field.type)
    )


def _pack(table: pa.Table) -> pa.Table:
    """Fixed-size lists of float16 as fixed-size binaries, marked for `_unpack`."""
    for index, field in enumerate(table.schema):
        kind = field.type
        if not (pa.types.is_fixed_size_list(kind) and pa.types.is_float16(kind.value_type)):
            continue
        values = np.ascontiguousarray(_matrix(table, field.name))
        binary = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2 * kind.list_size), len(values), [None, pa.py_buffer(values)]
        )
        metadata = {**(field.metadata or {}), _PACKED: str(kind.list_size).encode()}
        table = table.set_column(
            index, pa.field(field.name, binary.type, nullable=False, metadata=metadata), binary
        )
    return table


def _unpack(table: pa.Table) -> pa.Table:
    for index, field in enumerate(table.schema):
        if not field.metadata or _PACKED not in field.metadata:
            continue
        width = int(field.metadata[_PACKED])
        column = table.column(index)
        array = (
            column.chunk(0)
            if column.num_chunks == 1
            else pa.concat_arrays(column.chunks or [pa.array([], field.type)])
        )
        data = array.buffers()[1]
        flat = pa.Array.from_buffers(
            pa.float16(), len(array) * width, [None, data], offset=array.offset * width
        )
        lists = pa.FixedSizeListArray.from_arrays(flat, width)
        metadata = {
            name: value for name, value in field.metadata.items() if name != _PACKED
        } or None
        table = table.set_column(
            index, pa.field(field.name, lists.type, nullable=False, metadata=metadata), lists
        )
    return table


def _damaged(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path} is not a complete Parquet file ({error}): remove it and run the stage that wrote "
        "it again"
    )
