"""Second pass of stage `corpus`: the bytes are fetched again, and the shards of the plan and the quarantine written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smalti import shards, storage
from smalti.errors import DataError
from smalti.shards import CORPUS, QUARANTINE, Receipt
from smalti.workflows.corpus_dedup import Place, marks_key
from smalti.workflows.corpus_index import image_id, read_rows
from smalti.workflows.corpus_layout import Part, Plan, rows_of
from smalti.workflows.corpus_look import each
from smalti.workflows.shard_pipeline import standing
from smalti.workflows.shard_tally import HERE, Tally, shown
from smalti.workflows.sources import Group
from smalti.workflows.stage import StageRun

LISTING = "listing.json"
QUARANTINE_ROWS = 10_000
INLINE_PIECES = 4  # shards of quarantine that are written in this process
ShardItem = tuple[str, list[tuple[Place, Group, list[int]]]]  # key; and of each part its group and range of rows


def write_shards(
    run: StageRun, tally: Tally, groups: Mapping[str, Sequence[Group]], places: list[Place], plan: Plan
) -> dict[str, int]:
    """Write every shard of the plan that is not there yet, and the quarantine; the rows of each shard by key."""
    lost = list(plan.pieces("quarantine", QUARANTINE_ROWS))
    for _ in each(run, tally, lost, WriteQuarantine, (run.path, places), inline=len(lost) <= INLINE_PIECES):
        pass
    items = list(shard_items(groups, places, plan, run.recipe.corpus.shard_images))
    rows: dict[str, int] = {}
    with shown(run, tally, plan.counts()["images"]) as update:
        for receipts in each(run, tally, items, WriteShards, (run.path,)):
            rows |= {receipt.key: receipt.rows for receipt in receipts}
            update(sum(receipt.rows for receipt in receipts))
    return rows


def shard_items(
    groups: Mapping[str, Sequence[Group]], places: Sequence[Place], plan: Plan, size: int
) -> Iterator[list[ShardItem]]:
    """Shards that one call writes: one; or those that begin in the same group, where a group is read `in_order`, so that
    a file that cannot be read from the middle is read once a split, and not up to its place for each shard."""
    for split in shards.SPLITS:
        item: list[ShardItem] = []
        for key, parts in plan.pieces(split, size):
            where = [places[place] for place, _, _ in parts]
            named = [(one, groups[one.split][one.number], rows) for one, (_, *rows) in zip(where, parts, strict=True)]
            if item and not (item[-1][1][0][0] == where[0] and named[0][1].in_order):
                yield item
                item = []
            item.append((key, named))
        if item:
            yield item


class WriteQuarantine:
    """Actor: some lost rows in, their quarantine shard on disk out; returns its receipt."""

    def __init__(self, path: str, places: list[Place]) -> None:
        self.path, self.places = path, places

    def read(self, item: tuple[str, list[Part]]) -> tuple[str, list[Part]]:
        return item

    def work(self, item: tuple[str, list[Part]]) -> Receipt:
        key, parts = item
        with HERE.part("write"):
            return shards.write_shard(self.path, key, pa.concat_tables([self.table(*part) for part in parts]))

    def table(self, number: int, start: int, end: int) -> pa.Table:
        place = self.places[number]
        rows = rows_of(self.path, place, "quarantine", start, end)
        index = read_rows(self.path, place.split, place.number, rows, ["key", "reason", "detail"])
        marks = shards.read_shard(self.path, marks_key(place.split, place.number), ["first"]).take(pa.array(rows))
        first = pc.binary_join_element_wise("the same bytes as ", marks["first"], "")
        arrays = {
            "source": pa.array([place.source] * len(rows), pa.string()),
            "key": index["key"],
            "reason": pc.coalesce(index["reason"], "duplicate"),
            "detail": pc.coalesce(index["detail"], first),
        }
        return pa.table([arrays[name] for name in QUARANTINE.names], QUARANTINE)


class WriteShards:
    """Actor: the rows of some shards in, the shards on disk out; returns their receipts."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.opened: tuple[Place, Any] | None = None  # the group that is read, and its reader

    def read(self, item: list[ShardItem]) -> list[ShardItem]:
        return item

    def work(self, item: list[ShardItem]) -> list[Receipt]:
        self.opened = None
        with ExitStack() as stack:
            return [self.shard(key, parts, stack) for key, parts in item]

    def shard(self, key: str, parts: list[tuple[Place, Group, list[int]]], stack: ExitStack) -> Receipt:
        """Write one shard. Readers are opened on `stack`; one that the next shard begins with stays open."""
        done = standing(self.path, key)
        if done is not None:
            HERE.count("kept")
            return done
        split = key.partition("/")[0]
        with HERE.part("read"):
            tables = [
                self.table(place, group, rows_of(self.path, place, split, start, end), stack)
                for place, group, (start, end) in parts
            ]
        with HERE.part("write"):
            return shards.write_shard(self.path, key, pa.concat_tables(tables))

    def table(self, place: Place, group: Group, rows: np.ndarray, stack: ExitStack) -> pa.Table:
        """Corpus rows of one group. Errors: DataError when the source gives other bytes than at the first pass, or none."""
        index = read_rows(self.path, place.split, place.number, rows)
        marks = shards.read_shard(self.path, marks_key(place.split, place.number), ["qa"]).take(pa.array(rows))
        columns = {name: index.column(name).to_pylist() for name in ("key", "start", "extent", "image_id")}
        data = []
        try:
            read = self.reader(place, group, stack)
            for key, start, extent, identity in zip(*columns.values(), strict=True):
                data.append(read((start, extent)))
                if image_id(data[-1]) != identity:
                    raise self.changed(f"{group.source}::{key}")
        except (FileNotFoundError, pa.ArrowException) as error:
            raise self.changed(group.source) from error
        named = [f"{group.source}::{key}" for key in columns["key"]]
        arrays = {"image": shards.bytes_column(data), "source": pa.array(named, pa.string())}
        arrays["qa"] = pc.coalesce(marks["qa"], index["qa"])
        return pa.table([arrays[name] if name in arrays else index[name] for name in CORPUS.names], CORPUS)

    def reader(self, place: Place, group: Group, stack: ExitStack) -> Any:
        """The group's reader: the one that is open, or a new one in its place."""
        if self.opened is None or self.opened[0] != place:
            stack.close()
            self.opened = place, stack.enter_context(group.reader())
        return self.opened[1]

    def changed(self, what: str) -> DataError:
        """The error of a source that is another one now. The listing goes, so that the next try starts over."""
        storage.remove(storage.join(self.path, LISTING))
        return DataError(
            f"{what} has changed while the corpus was made. "
            "Leave the source alone while it is read, and run the command again."
        )
