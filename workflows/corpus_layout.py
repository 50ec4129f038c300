"""Where each image of a corpus goes: duplicates, the split, the shards; from the index of what was found.

A pure function of the index, so that neither the number of tasks nor an interruption shows in the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from smalti import shards
from smalti.schema import Recipe
from smalti.workflows.sources import Group


def is_held_out(identity: str, fraction: float) -> bool:
    """Whether an image belongs to the held-out split: a pure function of its id."""
    return int(identity[:13], 16) / 16**13 < fraction


def index_key(split: str, number: int) -> str:
    """`index/train/00012`: the index of group 12 of the source of `train`."""
    return f"index/{shards.shard_key(split, number)}"


class SeenIds:
    """The ids met so far, 16 bytes each, in one set: fine up to some tens of millions of images."""

    def __init__(self) -> None:
        self._where: dict[bytes, str] = {}

    def first(self, identity: str, where: str) -> str | None:
        """None for an id that is new (it is kept with `where`), else where it was met first."""
        raw = bytes.fromhex(identity)
        earlier = self._where.setdefault(raw, where)
        return None if earlier is where else earlier


@dataclass
class Plan:
    """Which rows of which index go where: (source split, group, row) each, in order."""

    rows: dict[str, list[tuple[str, int, int]]] = field(default_factory=lambda: {"train": [], "val": []})
    quarantine: list[dict[str, str]] = field(default_factory=list)
    over_limit: int = 0
    found: int = 0

    def counts(self) -> dict[str, int]:
        train, val = len(self.rows["train"]), len(self.rows["val"])
        counts = {"images": train + val, "train": train, "val": val, "quarantined": len(self.quarantine)}
        counts |= {"over_limit": self.over_limit, "found": self.found}
        reasons = Counter(row["reason"] for row in self.quarantine)
        return counts | {f"quarantined/{reason}": count for reason, count in sorted(reasons.items())}

    def pieces(self, split: str, size: int) -> Iterator[tuple[str, list[tuple[str, int, list[int]]]]]:
        """(shard key, [(source split, group, rows)]) of each shard of a split."""
        rows = self.rows[split]
        for number, start in enumerate(range(0, len(rows), size)):
            parts: list[tuple[str, int, list[int]]] = []
            for source, group, row in rows[start : start + size]:
                if not parts or parts[-1][:2] != (source, group):
                    parts.append((source, group, []))
                parts[-1][2].append(row)
            yield shards.shard_key(split, number), parts


def lay_out(path: str, groups: Mapping[str, list[Group]], recipe: Recipe, by_hash: bool) -> Plan:
    """The plan that the indexes give. `by_hash`: the source of `train` feeds the held-out split too.

    The first of equal images stays; a held-out source comes first, so that an image that lies in both is dropped from
    training. Reading stops where every split that a source feeds has `limit` images.
    """
    section, plan, seen = recipe.corpus, Plan(), SeenIds()
    limit = section.limit
    for source, members in groups.items():
        fed = ["train", "val"] if by_hash and section.val_fraction else [source]
        for number, group in enumerate(members):
            if limit is not None and all(len(plan.rows[split]) >= limit for split in fed):
                break
            table = shards.read_shard(path, index_key(source, number), ["key", "image_id", "reason", "detail"])
            for row, (key, identity, reason, detail) in enumerate(zip(*table.to_pydict().values(), strict=True)):
                if limit is not None and all(len(plan.rows[split]) >= limit for split in fed):
                    break
                plan.found += 1
                where = f"{group.source}::{key}"
                if reason is None and (first := seen.first(identity, where)) is not None:
                    reason, detail = "duplicate", f"the same bytes as {first}"
                if reason is not None:
                    lost = {"source": group.source, "key": key, "reason": reason, "detail": detail}
                    plan.quarantine.append(lost)
                    continue
                split = "val" if by_hash and is_held_out(identity, section.val_fraction) else source
                if limit is not None and len(plan.rows[split]) >= limit:
                    plan.over_limit += 1
                else:
                    plan.rows[split].append((source, number, row))
    return plan
