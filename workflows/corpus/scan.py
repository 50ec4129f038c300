"""First pass of stage `corpus` on the driver: index, find duplicates, plan shards."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from smalti.schema import CorpusSection
from smalti.workflows.corpus import dedup
from smalti.workflows.corpus.dedup import FindDuplicates, GroupCounts, MarkGroups, Place
from smalti.workflows.corpus.index import IndexGroup
from smalti.workflows.corpus.layout import Layout, lay_out
from smalti.workflows.pipeline.shards import Item, Loaded, Result, ShardWorker, run_shards
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.pipeline.timings import PROCESS_TALLY, Tally, shown
from smalti.workflows.sources import Group

INLINE_ROWS = 100_000  # up to so many are handled in this process: an actor takes longer to start


def each(
    run: StageRun,
    tally: Tally,
    items: Sequence[Item],
    worker: Callable[..., ShardWorker[Item, Loaded, Result]],
    args: tuple[object, ...],
    inline: bool = False,
) -> Generator[Result, None, None]:
    """Yield the result of each item, on Ray or (`inline`) in this process.

    What the workers counted is added to the tally before the result is yielded.
    """
    if not inline:
        yield from run_shards(items, worker, args, run.recipe.resources, model=False, tally=tally)
        return
    here = worker(*args)
    for item in items:
        result = here.work(here.read(item))
        tally.add(PROCESS_TALLY.drain())
        yield result


def check_and_plan(
    run: StageRun, tally: Tally, groups: Mapping[str, Sequence[Group]]
) -> tuple[list[Place], Layout]:
    """Check the images and plan the shards.

    Returns:
        The groups that were read, in order (with a limit only as many as it needs), and the plan.
    """
    section = run.recipe.corpus
    total = sum(map(len, groups.values()))
    run.log(f"checking every image: {total:,} groups of input")
    need = section.limit
    with shown(run, tally, total, "groups") as update:
        checking = _Checking(run, tally, update)
        while True:
            first = {split: checking.at(split, members, need) for split, members in groups.items()}
            places = [
                Place(split, n, groups[split][n].source)
                for split, count in first.items()
                for n in range(count)
            ]
            plan = _plan(
                run,
                tally,
                places,
                sum(checking.done[one.split, one.number].found for one in places),
            )
            if need is None or _enough(plan, groups, first, section):
                return places, plan
            need *= 2


@dataclass(frozen=True)
class _Found:
    """Rows of a group, and how many of them are usable."""

    found: int
    usable: int


@dataclass
class _Checking:
    """Results of the groups read so far, by (split, group). `need` only grows."""

    run: StageRun
    tally: Tally
    update: Callable[..., None]
    done: dict[tuple[str, int], _Found] = field(default_factory=dict)
    # consecutive groups of a split from the first, and their usable images
    front: dict[str, tuple[int, int]] = field(default_factory=dict)
    images: int = 0
    unusable: int = 0

    def at(self, split: str, members: Sequence[Group], need: int | None) -> int:
        """Read groups until the first ones hold `need` usable images.

        More may be read; they are kept in `done`.

        Returns:
            How many of the first groups are needed.
        """
        items = [
            (split, number, group)
            for number, group in enumerate(members)
            if (split, number) not in self.done
        ]
        if need is None or self.first_with(split, need) is None:
            args = (self.run.path, self.run.recipe.corpus)
            with closing(each(self.run, self.tally, items, IndexGroup, args)) as checked:
                for number, rows, lost in checked:
                    self.done[split, number] = _Found(rows, rows - lost)
                    self.images += rows
                    self.unusable += lost
                    self.update(1, images=self.images, unusable=self.unusable)
                    if need is not None and self.first_with(split, need) is not None:
                        break
        return len(members) if need is None else self.first_with(split, need) or len(members)

    def first_with(self, split: str, need: int) -> int | None:
        """How many of the first groups hold `need` usable images; None if unknown yet."""
        number, usable = self.front.get(split, (0, 0))
        while usable < need and (split, number) in self.done:
            usable += self.done[split, number].usable
            number += 1
        self.front[split] = number, usable
        return number if usable >= need else None


def _enough(
    plan: Layout,
    groups: Mapping[str, Sequence[Group]],
    first: Mapping[str, int],
    section: CorpusSection,
) -> bool:
    """Whether every split has `limit` images, or no further group can feed it."""
    limit = section.limit or 0
    for split, members in groups.items():
        fed = ["train", "val"] if "val" not in groups and section.val_fraction else [split]
        if first[split] < len(members) and any(plan.total(name) < limit for name in fed):
            return False
    return True


def _plan(run: StageRun, tally: Tally, places: list[Place], rows: int) -> Layout:
    """Find the duplicates among the groups, and plan the shards."""
    section = run.recipe.corpus
    by_hash = not section.val_source
    dedup.clear(run.path)
    ranges = dedup.buckets(rows) if places else []
    small = rows <= INLINE_ROWS
    for _ in each(run, tally, ranges, FindDuplicates, (run.path, places), inline=small):
        pass
    marked: dict[int, GroupCounts] = {}
    args = (run.path, places, ranges, section.val_fraction if by_hash else None)
    for found in each(run, tally, list(dedup.spans(len(places))), MarkGroups, args, inline=small):
        marked.update(found)
    counts = [marked[number] for number in range(len(places))]
    return lay_out(
        run.path, places, counts, section.limit, by_hash=by_hash and section.val_fraction > 0
    )
