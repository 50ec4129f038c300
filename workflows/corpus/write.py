"""Second pass of stage `corpus`: read the bytes again and write the shards."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smalti import shards, storage
from smalti.errors import DataError
from smalti.shards import CORPUS, QUARANTINE, Receipt
from smalti.workflows.corpus.dedup import Place, marks_key
from smalti.workflows.corpus.index import image_id, read_rows
from smalti.workflows.corpus.layout import Layout, RowRange, rows_of
from smalti.workflows.corpus.scan import each
from smalti.workflows.pipeline.finished_shards import finished_receipt, refuse_foreign
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.pipeline.timings import PROCESS_TALLY, Tally, shown
from smalti.workflows.sources import Group, Unusable
from smalti.workflows.sources.base import ReadBytes, is_arrows, is_of_file
from smalti.workflows.sources.jsonl import JsonLinesGroup, Reach
from smalti.workflows.sources.network import UnreachedError, reading

LISTING = "listing.json"
GONE = "gone"  # images that vanished between the passes, one file per shard
# errors of a source that has changed: truncated, or another file
DAMAGE = (
    pa.ArrowException,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    LookupError,
)
QUARANTINE_ROWS = 10_000
INLINE_PIECES = 4  # up to so many quarantine shards are written in this process
# key; and of each part its group and range of rows
ShardItem = tuple[str, list[tuple[Place, Group, list[int]]]]


def write_shards(
    run: StageRun,
    tally: Tally,
    groups: Mapping[str, Sequence[Group]],
    places: list[Place],
    plan: Layout,
) -> tuple[dict[str, int], int]:
    """Write the missing shards of the plan, and the quarantine.

    Returns:
        Rows of each shard by key, and the number of images without a caption.

    Raises:
        DataError: if the folder holds shards that are not in the plan.
    """
    lost = list(plan.shard_parts("quarantine", QUARANTINE_ROWS))
    for _ in each(
        run, tally, lost, WriteQuarantine, (run.path, places), inline=len(lost) <= INLINE_PIECES
    ):
        pass
    items = list(shard_items(groups, places, plan, run.recipe.corpus.shard_images))
    refuse_foreign(
        run.path, [key for item in items for key, _ in item], "are not of the corpus's source"
    )
    rows: dict[str, int] = {}
    bare = 0
    with shown(run, tally, plan.counts()["images"]) as update:
        for receipts in each(run, tally, items, WriteShards, (run.path,)):
            rows |= {receipt.key: receipt.rows for receipt, _ in receipts}
            bare += sum(without for _, without in receipts)
            update(sum(receipt.rows for receipt, _ in receipts))
    return rows, bare


def counted(path: str, plan: Layout) -> dict[str, int]:
    """The plan's counts, less the images that vanished between the passes.

    Those are written as a further quarantine shard.
    """
    counts = plan.counts()
    tables = []
    for split in shards.SPLITS:
        for key in shards.list_shards(path, f"{GONE}/{split}"):
            tables.append(shards.read_shard(path, key))
            for name in ("images", split):
                counts[name] -= len(tables[-1])
    if tables:
        lost = pa.concat_tables(tables)
        counts["quarantined"] += len(lost)
        counts["quarantined/vanished"] = len(lost)
        number = sum(1 for _ in plan.shard_parts("quarantine", QUARANTINE_ROWS))
        shards.write_shard(path, shards.shard_key("quarantine", number), lost)
    return counts


def shard_items(
    groups: Mapping[str, Sequence[Group]], places: Sequence[Place], plan: Layout, size: int
) -> Iterator[list[ShardItem]]:
    """Shards that one call writes.

    Usually one. Of a group that is read `in_order`, all shards that begin in it: a file without
    random access is then read once per split, not once per shard.
    """
    for split in shards.SPLITS:
        item: list[ShardItem] = []
        for key, parts in plan.shard_parts(split, size):
            where = [places[place] for place, _, _ in parts]
            named = [
                (one, groups[one.split][one.number], rows)
                for one, (_, *rows) in zip(where, parts, strict=True)
            ]
            if item and not (item[-1][1][0][0] == where[0] and named[0][1].in_order):
                yield item
                item = []
            item.append((key, named))
        if item:
            yield item


class WriteQuarantine:
    """Actor: writes a quarantine shard of unusable rows; returns its receipt."""

    def __init__(self, path: str, places: list[Place]) -> None:
        self.path = path
        self.places = places

    def read(self, item: tuple[str, list[RowRange]]) -> tuple[str, list[RowRange]]:
        return item

    def work(self, item: tuple[str, list[RowRange]]) -> Receipt:
        key, parts = item
        with PROCESS_TALLY.part("write"):
            return shards.write_shard(
                self.path, key, pa.concat_tables([self.table(*part) for part in parts])
            )

    def table(self, number: int, start: int, end: int) -> pa.Table:
        place = self.places[number]
        rows = rows_of(self.path, place, "quarantine", start, end)
        index = read_rows(self.path, place.split, place.number, rows, ["key", "reason", "detail"])
        marks = shards.read_shard(self.path, marks_key(place.split, place.number), ["first"]).take(
            pa.array(rows)
        )
        first = pc.binary_join_element_wise("the same bytes as ", marks["first"], "")
        arrays = {
            "source": pa.array([place.source] * len(rows), pa.string()),
            "key": index["key"],
            "reason": pc.coalesce(index["reason"], "duplicate"),
            "detail": pc.coalesce(index["detail"], first),
        }
        return pa.table([arrays[name] for name in QUARANTINE.names], QUARANTINE)


class WriteShards:
    """Actor: writes some shards; returns (receipt, images without a caption) of each."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.opened: tuple[Place, ReadBytes] | None = None  # the open group and its reader

    def read(self, item: list[ShardItem]) -> list[ShardItem]:
        return item

    def work(self, item: list[ShardItem]) -> list[tuple[Receipt, int]]:
        self.opened = None
        with ExitStack() as stack:
            return [self.shard(key, parts, stack) for key, parts in item]

    def shard(
        self, key: str, parts: list[tuple[Place, Group, list[int]]], stack: ExitStack
    ) -> tuple[Receipt, int]:
        """Write one shard; returns its receipt and the images without a caption.

        Readers are opened on `stack`; the last stays open for the next shard.
        """
        done = finished_receipt(self.path, key, ["image_id", "caption"])
        if done is not None:
            PROCESS_TALLY.count("kept")
            return done, shards.read_shard(self.path, key, ["caption"])["caption"].null_count
        split = key.partition("/")[0]
        gone: list[dict[str, str]] = []
        with PROCESS_TALLY.part("read"):
            tables = [
                self.table(place, group, rows_of(self.path, place, split, start, end), stack, gone)
                for place, group, (start, end) in parts
            ]
        with PROCESS_TALLY.part("write"):
            if gone:  # before the shard: if the shard exists, so does this
                shards.write_shard(
                    self.path, f"{GONE}/{key}", pa.Table.from_pylist(gone, QUARANTINE)
                )
            elif any(isinstance(group, JsonLinesGroup) for _, group, _ in parts):
                storage.remove(shards.shard_path(self.path, f"{GONE}/{key}"))
            whole = pa.concat_tables(tables)
            return shards.write_shard(self.path, key, whole), whole["caption"].null_count

    def table(
        self,
        place: Place,
        group: Group,
        rows: np.ndarray,
        stack: ExitStack,
        gone: list[dict[str, str]],
    ) -> pa.Table:
        """Corpus rows of one group.

        A missing or unreachable source may come back: only changed bytes make the next run start
        over. A changed image of a JSON lines source is added to `gone`, as a row of quarantine; the
        others are kept.

        Raises:
            DataError: if the source returns other bytes than in the first pass, or none.
        """
        index = read_rows(self.path, place.split, place.number, rows)
        marks = shards.read_shard(self.path, marks_key(place.split, place.number), ["qa"]).take(
            pa.array(rows)
        )
        with reading(group.source):
            try:
                found = list(self.fetch(group, self.reader(place, group, stack), index))
            except FileNotFoundError as error:
                raise changed(group.source) from error
            except (*DAMAGE, OSError) as error:
                if isinstance(error, DAMAGE) or is_arrows(error):
                    raise self.other_bytes(group.source) from error
                raise
        there = pa.array(
            [row for row, one in enumerate(found) if not isinstance(one, Unusable)], pa.int64()
        )
        for one in found:
            if isinstance(one, Unusable):
                row = {"source": group.source, "key": one.key}
                gone.append(row | {"reason": one.reason, "detail": one.detail})
        index = index.take(there)
        marks = marks.take(there)
        named = [f"{group.source}::{key}" for key in index.column("key").to_pylist()]
        data = [one for one in found if not isinstance(one, Unusable)]
        arrays = {"image": shards.bytes_column(data), "source": pa.array(named, pa.string())}
        arrays["qa"] = pc.coalesce(marks["qa"], index["qa"])
        return pa.table(
            [arrays[name] if name in arrays else index[name] for name in CORPUS.names], CORPUS
        )

    def fetch(self, group: Group, read: ReadBytes, index: pa.Table) -> Iterator[bytes | Unusable]:
        """Yield the bytes of each row.

        If each image is a file of its own, a changed one is dropped alone.
        """
        apart = isinstance(group, JsonLinesGroup)
        reach = Reach(group.source)
        columns = [
            index.column(name).to_pylist() for name in ("key", "start", "extent", "image_id")
        ]
        for key, start, extent, identity in zip(*columns, strict=True):
            try:
                data = read((start, extent))
                detail = "" if image_id(data) == identity else "its bytes have changed"
                reach.met()
            except (OSError, UnreachedError) as error:
                if not apart or (isinstance(error, OSError) and not is_of_file(error)):
                    raise
                if isinstance(error, UnreachedError):
                    reach.missed(f"line {key}")
                detail = f"it no longer exists: {error}"
            if detail and not apart:
                raise self.other_bytes(f"{group.source}::{key}")
            yield Unusable(key, "vanished", detail) if detail else data

    def reader(self, place: Place, group: Group, stack: ExitStack) -> ReadBytes:
        """The group's reader, opened if it is not the current one."""
        if self.opened is None or self.opened[0] != place:
            stack.close()
            self.opened = place, stack.enter_context(group.reader())
        return self.opened[1]

    def other_bytes(self, what: str) -> DataError:
        """The error of changed bytes; removes the listing, so that the next run starts over."""
        storage.remove(storage.join(self.path, LISTING))
        return changed(what)


def changed(what: str) -> DataError:
    """The error of a source that has changed."""
    return DataError(
        f"{what} has changed while the corpus was created. "
        "Do not change the source while it is read, then run the same command again."
    )
