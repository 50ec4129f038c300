"""Assign the images of a corpus to splits and shards.

By prefix sums over the counts of the groups: a pure function of the marks (`dedup`), so that
neither the number of tasks nor an interruption changes the result. Memory holds a few numbers per
group; rows stay in the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from smalti import shards
from smalti.workflows.corpus.dedup import (
    DUPLICATE,
    TRAIN,
    UNUSABLE,
    VAL,
    GroupCounts,
    Place,
    count_marks,
    marks_key,
)
from smalti.workflows.corpus.index import index_key

MARK_OF = {"train": (TRAIN,), "val": (VAL,), "quarantine": (UNUSABLE, DUPLICATE)}
RowRange = tuple[int, int, int]  # place, and the range of its rows of a kind: first and end


def is_held_out(identity: str, fraction: float) -> bool:
    """Whether an image is held out: a pure function of its id."""
    return int(identity[:13], 16) / 16**13 < fraction


@dataclass
class Layout:
    """How many rows of each group go to `train`, `val` and `quarantine`, in order."""

    parts: dict[str, list[RowRange]] = field(default_factory=lambda: {name: [] for name in MARK_OF})
    reasons: Counter[str] = field(default_factory=Counter)
    over_limit: int = 0
    merged: int = 0
    found: int = 0

    def total(self, name: str) -> int:
        """Rows of a split, or of `quarantine`."""
        return sum(end - start for _, start, end in self.parts[name])

    def counts(self) -> dict[str, int]:
        train, val = self.total("train"), self.total("val")
        counts = {
            "images": train + val,
            "train": train,
            "val": val,
            "quarantined": self.total("quarantine"),
        }
        counts |= {"over_limit": self.over_limit, "found": self.found}
        if self.merged:
            counts["merged"] = self.merged
        return counts | {
            f"quarantined/{reason}": count
            for reason, count in sorted(self.reasons.items())
            if count
        }

    def shard_parts(self, name: str, size: int) -> Iterator[tuple[str, list[RowRange]]]:
        """(key, parts) of each shard of a split or of `quarantine`, of `size` rows."""
        number = 0
        room = size
        parts: list[RowRange] = []
        for place, start, end in self.parts[name]:
            while start < end:
                taken = min(room, end - start)
                parts.append((place, start, start + taken))
                start += taken
                room -= taken
                if not room:
                    yield shards.shard_key(name, number), parts
                    number += 1
                    room = size
                    parts = []
        if parts:
            yield shards.shard_key(name, number), parts


def lay_out(
    path: str,
    places: Sequence[Place],
    marked: Sequence[GroupCounts],
    limit: int | None,
    by_hash: bool,
) -> Layout:
    """The plan for the counts of the groups.

    Reading stops when every split that a source feeds has `limit` images; the marks of the group
    where that happens are read row by row.

    Args:
        by_hash: whether the source of `train` also feeds the held-out split.
    """
    plan = Layout()
    full = {"train": 0, "val": 0}
    for number, (place, counts) in enumerate(zip(places, marked, strict=True)):
        fed = ("train", "val") if by_hash else (place.split,)
        if limit is not None:
            left = {split: limit - full[split] for split in fed}
            if all(room <= 0 for room in left.values()):
                continue
            if all(counts.kept[split] >= room for split, room in left.items()):
                counts = _until_full(path, place, left)
        for split in fed:
            here = (
                counts.kept[split]
                if limit is None
                else min(counts.kept[split], max(0, limit - full[split]))
            )
            plan.parts[split].append((number, 0, here))
            plan.over_limit += counts.kept[split] - here
            full[split] += here
        plan.parts["quarantine"].append((number, 0, sum(counts.reasons.values())))
        plan.reasons.update(counts.reasons)
        plan.merged += counts.merged
        plan.found += counts.rows
    return plan


def _until_full(path: str, place: Place, left: dict[str, int]) -> GroupCounts:
    """Counts of a group's rows up to the one that fills the last split."""
    marks = (
        shards.read_shard(path, marks_key(place.split, place.number), ["mark"])
        .column("mark")
        .to_numpy()
    )
    last = [
        int(np.flatnonzero(marks == MARK_OF[split][0])[room - 1])
        for split, room in left.items()
        if room > 0
    ]
    end = max(last) + 1
    index = shards.read_shard(path, index_key(place.split, place.number), ["reason"])
    return count_marks(marks[:end], index.column("reason").slice(0, end))


def rows_of(path: str, place: Place, name: str, start: int, end: int) -> np.ndarray:
    """Row numbers (int64) in a group's index of some rows of a split or `quarantine`.

    They are its rows `start` to `end` - 1 there.
    """
    marks = (
        shards.read_shard(path, marks_key(place.split, place.number), ["mark"])
        .column("mark")
        .to_numpy()
    )
    return np.flatnonzero(np.isin(marks, MARK_OF[name]))[start:end]
