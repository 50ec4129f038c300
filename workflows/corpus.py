"""Stage `corpus`: images from any source, verified, without duplicates, split, in shards; the rest in quarantine.

Two passes over the source, both on Ray. The first looks at every image (decoded whole once) and writes an index without
pixels, a file a group of input. From the index the driver drops duplicates, splits and lays out the shards: a pure
function of the source, so that neither the number of tasks nor an interruption shows in the result. The second pass
fetches the bytes again and writes the shards.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from smalti import images, shards, storage
from smalti.artifact import Artifact
from smalti.errors import DataError, ImageError
from smalti.progress import Progress, log
from smalti.schema import Recipe
from smalti.shards import CORPUS, QA, QUARANTINE
from smalti.tracking import Tracker
from smalti.workflows.corpus_layout import Plan, index_key, lay_out
from smalti.workflows.ray_session import ensure_ray
from smalti.workflows.shard_pipeline import run_shards, standing
from smalti.workflows.sources import Group, Lost, Sample, find_groups
from smalti.workflows.sources.base import printable, unreadable
from smalti.workflows.stage import StageRun, run_stage, stage_path

ID_DIGITS = 32  # hex digits of a sha256: 128 bits
QUARANTINE_ROWS = 10_000
LISTING = "listing.json"
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


def image_id(data: bytes) -> str:
    """Id of an image: 32 hex digits of the sha256 of its encoded bytes."""
    return hashlib.sha256(data).hexdigest()[:ID_DIGITS]


def _body(run: StageRun) -> dict[str, int]:
    recipe, section = run.recipe, run.recipe.corpus
    groups = _groups(recipe)
    _same_listing(run, groups)
    with ensure_ray(recipe):
        _make_index(run, groups)
        plan = lay_out(run.path, groups, recipe, by_hash=not section.val_source)
        _write_quarantine(run.path, plan)
        _write_shards(run, groups, plan)
    counts = plan.counts()
    _check(run, plan, counts)
    storage.remove(storage.join(run.path, "index"))
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
    for name in (LISTING, "index", "train", "val", "quarantine"):
        storage.remove(storage.join(path, name))


# ---- first pass: look at every image -------------------------------------------------------------------------------


def _make_index(run: StageRun, groups: Mapping[str, list[Group]]) -> None:
    """Write the index of every group; with a limit, only until it is reached for certain."""
    items = {
        split: [(split, number, group) for number, group in enumerate(members)] for split, members in groups.items()
    }
    total = sum(map(len, items.values()))
    run.log(f"looking at every image: {total:,} groups of input")
    with run.progress(total, "groups") as bar:
        if run.recipe.corpus.limit is None:
            for _ in _index(run, [item for members in items.values() for item in members], bar):
                pass
            return
        for split, members in items.items():
            done: dict[int, int] = {}
            for number, usable in _index(run, members, bar):
                done[number] = usable
                if _limit_reached(run, split, done, groups):
                    break


def _index(run: StageRun, items: list[tuple[str, int, Group]], bar: Progress) -> Iterator[tuple[int, int]]:
    """(group, images that can be used) of each group indexed, in the order of completion."""
    section, tally = run.recipe.corpus, Counter[str]()
    args = (run.path, section.max_pixels, section.min_size)
    for number, rows, lost in run_shards(items, IndexGroup, args, run.recipe.resources, model=False):
        tally.update({"found": rows, "unusable": lost})
        bar.update(1, **tally)
        yield number, rows - lost


def _limit_reached(run: StageRun, split: str, done: dict[int, int], groups: Mapping[str, list[Group]]) -> bool:
    """Whether the groups indexed so far, up to the first that is missing, fill every split that this source feeds."""
    section, limit = run.recipe.corpus, run.recipe.corpus.limit or 0
    prefix = next(number for number in range(len(done) + 1) if number not in done)
    if sum(done[number] for number in range(prefix)) < limit:
        return False
    part = {split: groups[split][:prefix]} | ({"val": groups["val"]} if split != "val" and "val" in groups else {})
    plan = lay_out(run.path, dict(sorted(part.items(), reverse=True)), run.recipe, by_hash="val" not in groups)
    fed = [split] if split == "val" or "val" in groups or not section.val_fraction else ["train", "val"]
    return all(len(plan.rows[name]) >= limit for name in fed)


class IndexGroup:
    """Actor: one group of input in, its index on disk out; returns (group, rows, how many are lost)."""

    def __init__(self, path: str, max_pixels: int, min_size: int) -> None:
        self.path, self.max_pixels, self.min_size = path, max_pixels, min_size

    def read(self, item: tuple[str, int, Group]) -> tuple[str, int, Group]:
        return item

    def work(self, item: tuple[str, int, Group]) -> tuple[int, int, int]:
        split, number, group = item
        key = index_key(split, number)
        if standing(self.path, key) is None:
            try:
                rows = [self.row(found) for found in group.samples()]
            except OSError as error:
                raise unreadable(group.source, error) from error
            shards.write_shard(self.path, key, pa.Table.from_pylist(rows, INDEX))
        reasons = shards.read_shard(self.path, key, ["reason"]).column("reason").to_pylist()
        return number, len(reasons), sum(reason is not None for reason in reasons)

    def row(self, found: Sample | Lost) -> dict[str, Any]:
        """The index row of one sample, decoded whole to see that it can be used."""
        key = printable(found.key)
        if isinstance(found, Lost):
            return {"key": key, "reason": found.reason, "detail": printable(found.detail)}
        try:
            width, height = images.probe(found.data, max_pixels=self.max_pixels, min_size=self.min_size)
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


# ---- second pass: shards -------------------------------------------------------------------------------------------


def _write_quarantine(path: str, plan: Plan) -> None:
    for number, start in enumerate(range(0, len(plan.quarantine), QUARANTINE_ROWS)):
        table = pa.Table.from_pylist(plan.quarantine[start : start + QUARANTINE_ROWS], QUARANTINE)
        shards.write_shard(path, shards.shard_key("quarantine", number), table)


def _write_shards(run: StageRun, groups: Mapping[str, list[Group]], plan: Plan) -> None:
    """Write every shard of the plan that is not there yet."""
    size = run.recipe.corpus.shard_images
    items = [
        (key, [(source, number, groups[source][number], rows) for source, number, rows in parts])
        for split in shards.SPLITS
        for key, parts in plan.pieces(split, size)
    ]
    with run.progress(plan.counts()["images"], "images") as bar:
        for receipt in run_shards(items, WriteShard, (run.path,), run.recipe.resources, model=False):
            bar.update(receipt.rows)


class WriteShard:
    """Actor: the rows of one shard in, the shard on disk out; returns its receipt."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, item: tuple[str, list[tuple[str, int, Group, list[int]]]]) -> Any:
        return item

    def work(self, item: tuple[str, list[tuple[str, int, Group, list[int]]]]) -> shards.Receipt:
        key, parts = item
        done = standing(self.path, key)
        if done is not None:
            return done
        tables = [self.table(source, number, group, rows) for source, number, group, rows in parts]
        return shards.write_shard(self.path, key, pa.concat_tables(tables).combine_chunks())

    def table(self, source: str, number: int, group: Group, rows: list[int]) -> pa.Table:
        """Corpus rows of one group. Errors: DataError when the source gives other bytes than at the first pass, or none."""
        index = shards.read_shard(self.path, index_key(source, number)).take(pa.array(np.array(rows, np.int64)))
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
        arrays = {"image": pa.array(data, pa.binary()), "source": pa.array(named, pa.string())}
        return pa.table(
            [arrays.get(name, index[name] if name in INDEX.names else None) for name in CORPUS.names], CORPUS
        )

    def changed(self, what: str) -> DataError:
        """The error of a source that is another one now. The listing goes, so that the next try starts over."""
        storage.remove(storage.join(self.path, LISTING))
        return DataError(
            f"{what} has changed while the corpus was made. "
            "Leave the source alone while it is read, and run the command again."
        )


def _check(run: StageRun, plan: Plan, counts: dict[str, int]) -> None:
    """Nothing vanished; and each split that was asked for holds an image. Tells what lies in quarantine."""
    kept = sum(shards.shard_rows(run.path, key) for key in shards.list_shards(run.path))
    assert kept == counts["images"], f"{kept} rows in shards, {counts['images']} planned"
    assert kept + counts["quarantined"] + counts["over_limit"] == counts["found"], counts
    reasons = [f"{count:,} {name.partition('/')[2]}" for name, count in counts.items() if "/" in name]
    told = ", ".join(reasons) or "none"
    section = run.recipe.corpus
    if not counts["images"]:
        examples = "; ".join(f"{row['key']}: {row['detail']}" for row in plan.quarantine[:3])
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
