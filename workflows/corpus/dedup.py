"""Find the duplicates of a corpus by a shuffle over files.

No process holds all ids. `FindDuplicates` takes one range of ids from every group (a *bucket*) and
writes which rows are later copies. `MarkGroups` takes from every bucket what concerns some groups,
and writes a mark for each of their rows. The first copy is kept: groups are in the order of the
sources, the held-out one first, so that its images are dropped from training.

A later copy with question-answer pairs that the first lacks (VQA sets are published with one row
per question) adds them to the first and is counted as `merged`; this happens within one source
only, never from training to held-out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from smalti import shards, storage
from smalti.shards import QA
from smalti.workflows.corpus.index import PREFIXES, halves, ids_path, index_key, read_ids
from smalti.workflows.pipeline.timings import PROCESS_TALLY

UNUSABLE, TRAIN, VAL, DUPLICATE, MERGED = range(5)  # marks of a row
IDS_A_BUCKET = 500_000
GROUPS_A_SPAN = 64  # groups marked by one task, which opens each bucket's file once
COPIES = pa.schema(
    [
        ("group", pa.int32()),  # the copy's, by its place in the order of all groups
        ("row", pa.int64()),
        ("first", pa.string()),  # for people: source::key
        ("merged", pa.bool_()),
    ]
)
# pairs added to a first row
GIFTS = pa.schema([("group", pa.int32()), ("row", pa.int64()), ("qa", QA)])
MARKS = pa.schema([("mark", pa.int8()), ("first", pa.string()), ("qa", QA)])


@dataclass(frozen=True)
class Place:
    """A group: the split that its source feeds, its number there, and the source."""

    split: str
    number: int
    source: str


@dataclass(frozen=True)
class GroupCounts:
    """Counts of a group's marks."""

    rows: int
    kept: dict[str, int]
    reasons: dict[str, int]
    merged: int


def buckets(total: int) -> list[tuple[int, int]]:
    """Ranges of prefixes of about `IDS_A_BUCKET` ids each, when there are `total`."""
    count = min(PREFIXES, max(1, -(-total // IDS_A_BUCKET)))
    edges = [PREFIXES * one // count for one in range(count + 1)]
    return list(pairwise(edges))


def marks_key(split: str, number: int) -> str:
    """`marks/train/00012`."""
    return f"marks/{shards.shard_key(split, number)}"


class FindDuplicates:
    """Actor: writes the copies within a range of ids; returns how many."""

    def __init__(self, path: str, places: list[Place]) -> None:
        self.path = path
        self.places = places

    def read(self, item: tuple[int, int]) -> tuple[int, int]:
        return item

    def work(self, item: tuple[int, int]) -> int:
        with PROCESS_TALLY.part("match"):
            return self.find(item)

    def find(self, item: tuple[int, int]) -> int:
        """Write the copies and the added pairs of a range; returns the number of copies."""
        parts = [read_ids(ids_path(self.path, one.split, one.number), *item) for one in self.places]
        group = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        table = pa.concat_tables(parts).combine_chunks()
        high, low, row = (table.column(name).to_numpy() for name in ("high", "low", "row"))
        order = np.lexsort((row, group, low, high))
        high, low = high[order], low[order]
        same = np.zeros(len(order), bool)
        same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        copies, gifts = self.copies(table, group, row, order, same)
        for name, schema, rows in (("copies", COPIES, copies), ("gifts", GIFTS, gifts)):
            found = pa.Table.from_pylist(rows, schema).sort_by(
                [("group", "ascending"), ("row", "ascending")]
            )
            shards.write_shard(self.path, shards.shard_key(name, item[0]), found)
        return len(copies)

    def copies(
        self,
        table: pa.Table,
        group: np.ndarray,
        row: np.ndarray,
        order: np.ndarray,
        same: np.ndarray,
    ) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        """Rows of COPIES and of GIFTS.

        `same`: whether a row in `order` has the id of the row before it.
        """
        found: list[dict[str, object]] = []
        gifts: list[dict[str, object]] = []
        edges = np.diff(np.append(same, False).astype(np.int8))
        for start, end in zip(
            np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) + 1, strict=True
        ):
            first = order[start]
            place = self.places[group[first]]
            name = f"{place.source}::{table['key'][int(first)].as_py()}"
            pairs = table["qa"][int(first)].as_py() or []
            more: list[dict[str, str]] = []
            for one in order[start + 1 : end]:
                new = [
                    pair
                    for pair in table["qa"][int(one)].as_py() or []
                    if pair not in pairs and pair not in more
                ]
                merged = bool(new) and self.places[group[one]].split == place.split
                more += new if merged else []
                found.append(
                    {
                        "group": int(group[one]),
                        "row": int(row[one]),
                        "first": name,
                        "merged": merged,
                    }
                )
            if more:
                gifts.append(
                    {"group": int(group[first]), "row": int(row[first]), "qa": pairs + more}
                )
        return found, gifts


class MarkGroups:
    """Actor: writes the marks of a range of groups; returns [(place, GroupCounts)].

    `fraction`: share of each source that the hash holds out; None if the recipe names a held-out
    source.
    """

    def __init__(
        self, path: str, places: list[Place], ranges: list[tuple[int, int]], fraction: float | None
    ) -> None:
        self.path = path
        self.places = places
        self.ranges = ranges
        self.fraction = fraction

    def read(self, item: tuple[int, int]) -> tuple[int, int]:
        return item

    def work(self, item: tuple[int, int]) -> list[tuple[int, GroupCounts]]:
        with PROCESS_TALLY.part("match"):
            copies, gifts = (self.gather(name, *item) for name in ("copies", "gifts"))
            return [
                (number, self.mark(number, _of(copies, number), _of(gifts, number)))
                for number in range(*item)
            ]

    def gather(self, name: str, first: int, last: int) -> pa.Table:
        """Rows of all buckets on the groups `first` to `last` - 1."""
        parts = []
        for start, _ in self.ranges:
            part = shards.read_shard(self.path, shards.shard_key(name, start))
            edges = np.searchsorted(part.column("group").to_numpy(), [first, last])
            parts.append(part.slice(edges[0], edges[1] - edges[0]))
        return pa.concat_tables(parts).combine_chunks()

    def mark(self, number: int, copies: pa.Table, gifts: pa.Table) -> GroupCounts:
        place = self.places[number]
        index = shards.read_shard(
            self.path, index_key(place.split, place.number), ["image_id", "reason"]
        )
        usable = index.column("reason").is_null().to_numpy()
        marks = np.full(len(index), UNUSABLE, np.int8)
        marks[usable] = self.splits(
            place, index.column("image_id").filter(pa.array(usable)).to_pylist()
        )
        rows = copies.column("row").to_numpy()
        merged = copies.column("merged").to_numpy()
        marks[rows] = np.where(merged, MERGED, DUPLICATE)
        first = _scatter(len(index), rows, copies.column("first"))
        qa = _scatter(len(index), gifts.column("row").to_numpy(), gifts.column("qa"))
        table = pa.table([pa.array(marks), first, qa], MARKS)
        shards.write_shard(self.path, marks_key(place.split, place.number), table)
        return count_marks(marks, index.column("reason"))

    def splits(self, place: Place, identities: list[str]) -> np.ndarray:
        """TRAIN or VAL for each id: int8."""
        if self.fraction is None or not identities:
            return np.full(len(identities), VAL if place.split == "val" else TRAIN, np.int8)
        return np.where(held_out(halves(identities)[:, 0], self.fraction), VAL, TRAIN).astype(
            np.int8
        )


def held_out(high: np.ndarray, fraction: float) -> np.ndarray:
    """Whether images are held out, by the higher halves (uint64) of their ids.

    Their upper 52 bits, as a fraction, are compared with `fraction`.
    """
    return (high >> np.uint64(12)).astype(np.float64) / 2.0**52 < fraction


def count_marks(marks: np.ndarray, reasons: pa.ChunkedArray) -> GroupCounts:
    """Counts of some rows' marks (int8) and reasons."""
    number = np.bincount(marks, minlength=5)
    lost = Counter(reason for reason in reasons.to_pylist() if reason is not None)
    if number[DUPLICATE]:
        lost["duplicate"] += int(number[DUPLICATE])
    kept = {"train": int(number[TRAIN]), "val": int(number[VAL])}
    return GroupCounts(len(marks), kept, dict(lost), int(number[MERGED]))


def clear(path: str) -> None:
    """Remove the files of the shuffle."""
    for name in ("copies", "gifts", "marks"):
        storage.remove(storage.join(path, name))


def spans(count: int) -> Iterator[tuple[int, int]]:
    """Ranges of groups that one task marks."""
    return ((start, min(start + GROUPS_A_SPAN, count)) for start in range(0, count, GROUPS_A_SPAN))


def _of(table: pa.Table, number: int) -> pa.Table:
    """The rows of one group."""
    return table.filter(pa.array(table.column("group").to_numpy() == number))


def _scatter(size: int, rows: np.ndarray, values: pa.ChunkedArray) -> pa.Array:
    """An array of `size` with `values` at `rows`, null elsewhere."""
    places = np.full(size, -1, np.int64)
    places[rows] = np.arange(len(rows))
    return values.combine_chunks().take(pa.array(places, mask=places < 0))
