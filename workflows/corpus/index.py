"""First pass of stage `corpus`: decode every image once and write an index.

Two files are written per group of input. Its index (`index/train/00012.parquet`) has a row for each
item found, in order, without pixels. Its ids (`ids/train/00012.arrow`) are those of the usable
images, sorted, in batches by prefix, so that `dedup` can read a range of prefixes of all groups.
Rows are written as a stream: of a group of a million images a few thousand are in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smalti import images, shards, storage
from smalti.errors import ImageError
from smalti.schema import CorpusSection
from smalti.shards import QA
from smalti.workflows.pipeline.finished_shards import finished_receipt
from smalti.workflows.pipeline.timings import PROCESS_TALLY
from smalti.workflows.sources import Group, Sample, Unusable
from smalti.workflows.sources.base import printable
from smalti.workflows.sources.network import reading

IndexRow = dict[str, object]  # a row of `INDEX`

if TYPE_CHECKING:
    from smalti.workflows.pipeline.stage import StageRun

ID_DIGITS = 32  # hex digits of a sha256: 128 bits
INDEX_ROWS = 4096  # rows per row group, and in memory while an index is written
PREFIXES = 128  # values of the first 7 bits of an id
IDS_A_BATCH = 1024  # minimum per batch of an ids file
INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("start", pa.int64()),
        ("extent", pa.int64()),
        ("image_id", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("qa", QA),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
IDS = pa.schema(
    [
        ("high", pa.uint64()),
        ("low", pa.uint64()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("qa", QA),
    ]
)


def image_id(data: bytes) -> str:
    """Id of an image: first 32 hex digits of the sha256 of its bytes."""
    return hashlib.sha256(data).hexdigest()[:ID_DIGITS]


def halves(identities: list[str]) -> np.ndarray:
    """Ids as uint64 (N, 2), the higher half first; same order as the ids."""
    return np.frombuffer(bytes.fromhex("".join(identities)), ">u8").astype(np.uint64).reshape(-1, 2)


def index_key(split: str, number: int) -> str:
    """`index/train/00012`: the index of group 12 of the source of `train`."""
    return f"index/{shards.shard_key(split, number)}"


def ids_path(path: str, split: str, number: int) -> str:
    """The file with the ids of group `number` of the source of `split`."""
    return storage.join(path, "ids", f"{shards.shard_key(split, number)}.arrow")


def read_rows(
    path: str, split: str, number: int, rows: np.ndarray, columns: list[str] | None = None
) -> pa.Table:
    """Rows (int64, ascending) of a group's index; only the row groups that hold them are read."""
    blocks = np.unique(rows // INDEX_ROWS)
    with (
        storage.open_read(shards.shard_path(path, index_key(split, number))) as stream,
        pq.ParquetFile(stream) as file,
    ):
        if not len(rows):
            return file.schema_arrow.empty_table().select(columns or INDEX.names)
        table = file.read_row_groups(blocks.tolist(), columns=columns)
    within = np.searchsorted(blocks, rows // INDEX_ROWS) * INDEX_ROWS + rows % INDEX_ROWS
    return table.take(pa.array(within))


def check_image(found: Sample, section: CorpusSection) -> tuple[int, int]:
    """Decode an image fully and check it against the section.

    Returns:
        Width and height in pixels.

    Raises:
        ImageError: with the reason why it cannot be used.
    """
    check_file(found, section)
    width, height = images.probe(
        found.data, max_pixels=section.max_pixels, min_size=section.min_size
    )
    if section.max_aspect is not None and max(width, height) > section.max_aspect * min(
        width, height
    ):
        raise ImageError(
            f"{width} x {height} pixels, and corpus.max_aspect is {section.max_aspect:g}", "aspect"
        )
    return width, height


def check_file(found: Sample, section: CorpusSection) -> None:
    """Check what needs no decoding.

    Raises:
        ImageError: with the reason why the image cannot be used.
    """
    if len(found.data) > section.max_bytes:
        raise ImageError(
            f"{len(found.data):,} bytes, and corpus.max_bytes is {section.max_bytes:,}", "too_large"
        )
    if section.require_caption and not found.caption:
        raise ImageError("it has no caption, and corpus.require_caption is set", "no_caption")


def log_second_images(run: StageRun, counts: Mapping[str, int]) -> None:
    """Log how many images share the key of another, with an example.

    Dots in the names of a tar can give many images one key.
    """
    if not (number := counts.get("quarantined/second_image", 0)):
        return
    for key in shards.list_shards(run.path, "quarantine"):
        for row in shards.read_shard(run.path, key).to_pylist():
            if row["reason"] == "second_image":
                run.log(
                    f"{number:,} images are left out because they share the key of another, such "
                    f"as {row['key']} in {row['source']} ({row['detail']}): if each is a separate "
                    "image, name them without further dots"
                )
                return


class IndexGroup:
    """Actor: writes a group's index and ids; returns (group, rows, unusable rows)."""

    def __init__(self, path: str, section: CorpusSection) -> None:
        self.path = path
        self.section = section

    def read(self, item: tuple[str, int, Group]) -> tuple[str, int, Group]:
        return item

    def work(self, item: tuple[str, int, Group]) -> tuple[int, int, int]:
        split, number, group = item
        key = index_key(split, number)
        if finished_receipt(self.path, key) is not None:
            PROCESS_TALLY.count("kept")
        else:
            with reading(group.source):
                self.write(split, number, group)
        lost = shards.read_shard(self.path, key, ["reason"]).column("reason")
        return number, len(lost), len(lost) - lost.null_count

    def write(self, split: str, number: int, group: Group) -> None:
        """Write the ids of a group, then its index: if the index exists, so do the ids."""
        sink = pa.BufferOutputStream()
        ids: list[pa.Table] = []
        count = 0
        with pq.ParquetWriter(
            sink, INDEX, compression="zstd", use_compliant_nested_type=False
        ) as writer:
            for rows in _chunks(self.rows(group), INDEX_ROWS):
                with PROCESS_TALLY.part("write"):
                    table = pa.Table.from_pylist(rows, INDEX)
                    writer.write_table(table, row_group_size=INDEX_ROWS)
                    ids.append(ids_of(table, count))
                count += len(rows)
        with PROCESS_TALLY.part("write"):
            write_ids(ids_path(self.path, split, number), ids)
            index = shards.shard_path(self.path, index_key(split, number))
            storage.write_atomic(index, memoryview(sink.getvalue()))

    def rows(self, group: Group) -> Iterator[IndexRow]:
        """The index rows of a group, in order."""
        for found in PROCESS_TALLY.timed("read", group.samples()):
            with PROCESS_TALLY.part("decode"):
                row = self.row(found)
            yield row

    def row(self, found: Sample | Unusable) -> IndexRow:
        """The index row of one sample, which is decoded fully to check it."""
        key = printable(found.key)
        if isinstance(found, Unusable):
            return {"key": key, "reason": found.reason, "detail": printable(found.detail)}
        try:
            width, height = check_image(found, self.section)
        except ImageError as error:
            return {"key": key, "reason": error.reason, "detail": str(error)}
        return {
            "key": key,
            "start": found.locator[0],
            "extent": found.locator[1],
            "image_id": image_id(found.data),
            "width": width,
            "height": height,
            "caption": found.caption,
            "label": found.label,
            "qa": [{"question": question, "answer": answer} for question, answer in found.qa],
        }


def _chunks(rows: Iterable[IndexRow], size: int) -> Iterator[list[IndexRow]]:
    rest = iter(rows)
    while chunk := list(islice(rest, size)):
        yield chunk


def ids_of(table: pa.Table, first: int) -> pa.Table:
    """Ids of the usable rows of a part of an index that starts at row `first`."""
    rows = np.flatnonzero(table.column("reason").is_null().to_numpy())
    used = table.select(["image_id", "key", "qa"]).take(pa.array(rows))
    numbers = halves(used.column("image_id").to_pylist())
    arrays = [
        pa.array(numbers[:, 0]),
        pa.array(numbers[:, 1]),
        pa.array(rows + first),
        used["key"],
        used["qa"],
    ]
    return pa.table(arrays, IDS)


def write_ids(path: str, parts: list[pa.Table]) -> None:
    """Write ids sorted by id, then row.

    Each of the 1 to `PREFIXES` batches holds an equal range of prefixes.
    """
    table = pa.concat_tables(parts) if parts else IDS.empty_table()
    table = table.sort_by(
        [("high", "ascending"), ("low", "ascending"), ("row", "ascending")]
    ).combine_chunks()
    count = min(PREFIXES, 1 << (len(table) // IDS_A_BATCH).bit_length())
    ends = np.searchsorted(_prefixes(table), np.arange(count + 1) * (PREFIXES // count))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, IDS) as writer:
        for start, end in pairwise(ends):
            batches = table.slice(start, end - start).to_batches()
            writer.write_batch(batches[0] if batches else _EMPTY)
    storage.write_atomic(path, memoryview(sink.getvalue()))


_EMPTY = pa.RecordBatch.from_pylist([], IDS)


def _prefixes(table: pa.Table) -> np.ndarray:
    """The first 7 bits of each id: int64."""
    high = table.column("high").to_numpy()
    return (high >> np.uint64(64 - (PREFIXES - 1).bit_length())).astype(np.int64)


def read_ids(path: str, first: int, last: int) -> pa.Table:
    """The ids of the prefixes `first` to `last` - 1, sorted."""
    with storage.open_read(path) as stream, pa.ipc.open_file(stream) as file:
        step = PREFIXES // file.num_record_batches
        numbers = range(first // step, -(-last // step))
        table = pa.Table.from_batches([file.get_batch(number) for number in numbers], IDS)
    start, end = np.searchsorted(_prefixes(table), [first, last])
    return table.slice(start, end - start)
