"""Stage `corpus`: images from any source, verified, without duplicates, split, in shards; the rest in quarantine.

Two passes over the source, both on Ray. The first looks at every image (decoded whole once) and writes an index without
pixels, a file a group of input (`corpus_index`). From the indexes duplicates are found by a shuffle over files
(`corpus_dedup`), and the shards are laid out from counts (`corpus_layout`): a pure function of the source, so that
neither the number of tasks nor an interruption shows in the result. The second pass fetches the bytes again and writes
the shards. This process holds a few numbers a group and a shard, never the images' ids.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smalti import shards, storage
from smalti.artifact import Artifact
from smalti.errors import DataError
from smalti.progress import Progress, log
from smalti.schema import CorpusSection, Recipe
from smalti.shards import CORPUS, QUARANTINE
from smalti.tracking import Tracker
from smalti.workflows import corpus_dedup
from smalti.workflows.corpus_dedup import FindDuplicates, GroupCounts, MarkGroups, Place, marks_key
from smalti.workflows.corpus_index import IndexGroup, image_id, read_rows
from smalti.workflows.corpus_layout import Part, Plan, lay_out, rows_of
from smalti.workflows.ray_session import ensure_ray
from smalti.workflows.shard_pipeline import run_shards, standing
from smalti.workflows.sources import Group, find_groups
from smalti.workflows.stage import StageRun, run_stage, stage_path

QUARANTINE_ROWS = 10_000
LISTING = "listing.json"
WORK = ("index", "ids", "copies", "gifts", "marks")  # folders that the finished artifact does not keep
INLINE_ROWS = 100_000  # so few are sorted out in this process: an actor takes longer to start


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The corpus artifact: `train/`, `val/` and `quarantine/` shards.

    Counts: images, train, val, quarantined, over_limit, found (their sum), and `quarantined/<reason>`.
    Errors: DataError when the source cannot be found, or when a split that was asked for has no usable image.
    """
    stood = Artifact.find(stage_path(recipe, "corpus")) is not None
    made = run_stage(recipe, "corpus", "corpus", stage_config(recipe), {}, _body, tracker=tracker)
    if stood:
        _tell_of_change(recipe, made)
    return made


def stage_config(recipe: Recipe) -> dict[str, Any]:
    """What the corpus depends on. `image_size` is used on reading only, except by generated pictures."""
    section = recipe.corpus
    config = section.model_dump(mode="json", exclude={"image_size"})
    if section.format == "generated" or any(one.partition(":")[0] == "generated" for one in sources_of(recipe)):
        config |= {"image_size": recipe.corpus.image_size, "seed": recipe.seed}
    return config


def sources_of(recipe: Recipe) -> list[str]:
    """Every source that the recipe names."""
    given = [recipe.corpus.source, recipe.corpus.val_source]
    return [name for one in given for name in ([one] if isinstance(one, str) else one or [])]


def _body(run: StageRun) -> dict[str, int]:
    groups = _groups(run.recipe)
    _same_listing(run, groups)
    with ensure_ray(run.recipe):
        places, plan = _look_and_plan(run, groups)
        _write_shards(run, groups, places, plan)
    counts = plan.counts()
    _check(run, counts)
    for name in WORK:
        storage.remove(storage.join(run.path, name))
    return counts


def _groups(recipe: Recipe) -> dict[str, list[Group]]:
    """The groups of each source, the held-out one first."""
    section = recipe.corpus
    sources = {"val": section.val_source} if section.val_source else {}
    every = {**sources, "train": section.source}
    return {split: find_groups(source, section, recipe.seed) for split, source in every.items()}


def _listing(groups: Mapping[str, list[Group]]) -> dict[str, str]:
    """What the sources list, in short: files and what metadata says of them, not their bytes."""
    digest = hashlib.sha256()
    for split, members in groups.items():
        digest.update(split.encode())
        for group in members:
            digest.update(repr(group).encode())
    return {"listing": digest.hexdigest()}


def _tell_of_change(recipe: Recipe, made: Artifact) -> None:
    """A line when a finished corpus is of other files than the source lists now: its fingerprint is of settings alone.

    Looked at on this machine's disks only, where it is cheap; a source that is gone is no change.
    """
    path = storage.join(made.path, LISTING)
    if not all(storage.is_local(name) for name in sources_of(recipe)) or not storage.exists(path):
        return
    try:
        changed = storage.read_json(path) != _listing(_groups(recipe))
    except DataError:
        return
    if changed:
        log(f"corpus: the source lists other files now than when this was made; remove {made.path} to make it again")


def _same_listing(run: StageRun, groups: Mapping[str, list[Group]]) -> None:
    """Start over when the source lists other files than at the try that is gone on with."""
    listing, path = _listing(groups), storage.join(run.path, LISTING)
    if storage.exists(path) and storage.read_json(path) == listing:
        return
    if run.resumed:
        if storage.exists(path):
            run.log("the source has changed since the interrupted try: starting over")
        _clear(run.path)
    storage.write_json(path, listing)


def _clear(path: str) -> None:
    """Take away all that the stage has made."""
    for name in (LISTING, *WORK, "train", "val", "quarantine"):
        storage.remove(storage.join(path, name))


# ---- first pass: look at every image, find duplicates, plan ----------------------------------------------------------


def _look_and_plan(run: StageRun, groups: Mapping[str, list[Group]]) -> tuple[list[Place], Plan]:
    """The groups that were looked at, in order, and the plan. With a limit, only as many as it needs for certain."""
    section = run.recipe.corpus
    total = sum(map(len, groups.values()))
    run.log(f"looking at every image: {total:,} groups of input")
    done: dict[str, dict[int, tuple[int, int]]] = {split: {} for split in groups}
    need = section.limit
    with run.progress(total, "groups") as bar:
        while True:
            first = {split: _index(run, split, members, done[split], need, bar) for split, members in groups.items()}
            places = [Place(split, n, groups[split][n].source) for split, count in first.items() for n in range(count)]
            plan = _plan(run, places, sum(done[one.split][one.number][0] for one in places))
            if need is None or _enough(plan, groups, first, section):
                return places, plan
            need *= 2


def _enough(plan: Plan, groups: Mapping[str, list[Group]], first: Mapping[str, int], section: CorpusSection) -> bool:
    """Whether every split has `limit` images, or no group is left that could feed it."""
    limit = section.limit or 0
    for split, members in groups.items():
        fed = ["train", "val"] if "val" not in groups and section.val_fraction else [split]
        if first[split] < len(members) and any(plan.total(name) < limit for name in fed):
            return False
    return True


def _index(
    run: StageRun,
    split: str,
    members: Sequence[Group],
    done: dict[int, tuple[int, int]],
    need: int | None,
    bar: Progress,
) -> int:
    """Look at groups until the first ones hold `need` usable images; how many groups that takes.

    `done` (group → rows, usable ones) is filled with all that were looked at, which may be more.
    """
    items = [(split, number, group) for number, group in enumerate(members) if number not in done]
    tally = Counter[str]()
    if need is None or _first_with(done, need) is None:
        for number, rows, lost in _each(run, items, IndexGroup, (run.path, run.recipe.corpus)):
            done[number] = (rows, rows - lost)
            tally.update({"found": rows, "unusable": lost})
            bar.update(1, **tally)
            if need is not None and _first_with(done, need) is not None:
                break
    return len(members) if need is None else _first_with(done, need) or len(members)


def _first_with(done: Mapping[int, tuple[int, int]], need: int) -> int | None:
    """How many of the first groups hold `need` usable images; None while one that may be needed is missing."""
    usable = 0
    for number in range(len(done)):
        if number not in done:
            return None
        usable += done[number][1]
        if usable >= need:
            return number + 1
    return None


def _plan(run: StageRun, places: list[Place], rows: int) -> Plan:
    """Find the duplicates among some groups, and lay out the shards."""
    section = run.recipe.corpus
    by_hash = not section.val_source
    corpus_dedup.clear(run.path)
    ranges = corpus_dedup.buckets(rows) if places else []
    small = rows <= INLINE_ROWS
    for _ in _each(run, ranges, FindDuplicates, (run.path, places), inline=small):
        pass
    marked: dict[int, GroupCounts] = {}
    args = (run.path, places, ranges, section.val_fraction if by_hash else None)
    for found in _each(run, list(corpus_dedup.spans(len(places))), MarkGroups, args, inline=small):
        marked.update(found)
    counts = [marked[number] for number in range(len(places))]
    return lay_out(run.path, places, counts, section.limit, by_hash=by_hash and section.val_fraction > 0)


def _each(run: StageRun, items: Sequence[Any], worker: type, args: tuple[Any, ...], inline: bool = False) -> Iterator:
    """The result of each item, on Ray or in this process."""
    if not inline:
        yield from run_shards(items, worker, args, run.recipe.resources, model=False)
        return
    here = worker(*args)
    for item in items:
        yield here.work(here.read(item))


# ---- second pass: shards -------------------------------------------------------------------------------------------


def _write_shards(run: StageRun, groups: Mapping[str, list[Group]], places: list[Place], plan: Plan) -> None:
    """Write every shard of the plan that is not there yet, and the quarantine."""
    quarantine = WriteQuarantine(run.path, places)
    for item in plan.pieces("quarantine", QUARANTINE_ROWS):
        quarantine.work(item)
    size = run.recipe.corpus.shard_images
    items = [
        (key, [(places[place], groups[places[place].split][places[place].number], rows) for place, *rows in parts])
        for split in shards.SPLITS
        for key, parts in plan.pieces(split, size)
    ]
    with run.progress(plan.counts()["images"], "images") as bar:
        for receipt in _each(run, items, WriteShard, (run.path,)):
            bar.update(receipt.rows)


class WriteQuarantine:
    """Some lost rows in, their quarantine shard on disk out; returns its receipt."""

    def __init__(self, path: str, places: list[Place]) -> None:
        self.path, self.places = path, places

    def work(self, item: tuple[str, list[Part]]) -> shards.Receipt:
        key, parts = item
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


class WriteShard:
    """Actor: the rows of one shard in, the shard on disk out; returns its receipt."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, item: tuple[str, list[tuple[Place, Group, list[int]]]]) -> Any:
        return item

    def work(self, item: tuple[str, list[tuple[Place, Group, list[int]]]]) -> shards.Receipt:
        key, parts = item
        done = standing(self.path, key)
        if done is not None:
            return done
        split = key.partition("/")[0]
        tables = [
            self.table(place, group, rows_of(self.path, place, split, start, end))
            for place, group, (start, end) in parts
        ]
        return shards.write_shard(self.path, key, pa.concat_tables(tables))

    def table(self, place: Place, group: Group, rows: np.ndarray) -> pa.Table:
        """Corpus rows of one group. Errors: DataError when the source gives other bytes than at the first pass, or none."""
        index = read_rows(self.path, place.split, place.number, rows)
        marks = shards.read_shard(self.path, marks_key(place.split, place.number), ["qa"]).take(pa.array(rows))
        columns = {name: index.column(name).to_pylist() for name in ("key", "start", "extent", "image_id")}
        data = []
        try:
            with group.reader() as read:
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

    def changed(self, what: str) -> DataError:
        """The error of a source that is another one now. The listing goes, so that the next try starts over."""
        storage.remove(storage.join(self.path, LISTING))
        return DataError(
            f"{what} has changed while the corpus was made. "
            "Leave the source alone while it is read, and run the command again."
        )


def _check(run: StageRun, counts: dict[str, int]) -> None:
    """Nothing vanished; and each split that was asked for holds an image. Tells what lies in quarantine."""
    kept = sum(shards.shard_rows(run.path, key) for key in shards.list_shards(run.path))
    assert kept == counts["images"], f"{kept} rows in shards, {counts['images']} planned"
    gone = counts["quarantined"] + counts["over_limit"] + counts.get("merged", 0)
    assert kept + gone == counts["found"], counts
    reasons = [f"{count:,} {name.partition('/')[2]}" for name, count in counts.items() if "/" in name]
    told = ", ".join(reasons) or "none"
    section = run.recipe.corpus
    if not counts["images"]:
        lost = shards.list_shards(run.path, "quarantine")[:1]
        rows = [row for key in lost for row in shards.read_shard(run.path, key).slice(0, 3).to_pylist()]
        examples = "; ".join(f"{row['key']}: {row['detail']}" for row in rows)
        raise DataError(
            f"The corpus has 0 usable images of {counts['found']:,} found in {section.source} (unusable: {told})."
            f" {examples + '. ' if examples else ''}See {run.path}/quarantine, or set corpus.source."
        )
    if not counts["train"]:
        _clear(run.path)
        mend = "Name another corpus.val_source" if section.val_source else "Lower corpus.val_fraction"
        raise DataError(f"No image is left to train on: all {counts['val']:,} are held out. {mend}.")
    if not counts["val"] and (section.val_source or section.val_fraction):
        run.log("no image is held out: raise corpus.val_fraction, or name a corpus.val_source")
    if counts["quarantined"]:
        run.log(f"{counts['quarantined']:,} of {counts['found']:,} in quarantine ({told}); see {run.path}/quarantine")
