"""Stage `features` directly from a source of images (`features.source`).

No corpus is needed. A group's images are decoded, encoded and written in shards
`train/<group>-<piece>` and `val/<group>-<piece>` of at most `corpus.shard_images` images; one such
block of pixels is in memory. The record `groups/<group>.json` is written last: a restart computes
only the groups without one, with the same bytes. Unusable images are listed in quarantine.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import pyarrow as pa

from smalti import images, shards, storage
from smalti.artifact import Artifact
from smalti.errors import DataError, ImageError
from smalti.schema import Recipe, result_settings
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.corpus.index import check_file, check_image, image_id, log_second_images
from smalti.workflows.corpus.layout import is_held_out
from smalti.workflows.features.featurizer import Featurizer, open_parent
from smalti.workflows.pipeline.shards import run_shards
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.pipeline.timings import PROCESS_TALLY, shard_progress
from smalti.workflows.sources import Group, Sample, Unusable, find_groups, listed
from smalti.workflows.sources.base import printable
from smalti.workflows.sources.folder import ListedGroup
from smalti.workflows.sources.network import reading

LISTED = "listed"  # the listing of a folder, one file per group, until the stage is finished
GroupItem = tuple[int, Group, list[str]]  # number, group, and the existing shards of that number


class GroupRecord(TypedDict):
    """`groups/<group>.json`: the group's hash, its images, rows by shard and losses by reason."""

    group: str
    images: int
    shards: dict[str, int]
    lost: dict[str, int]


def source_config(recipe: Recipe) -> dict[str, object]:
    """Settings of the source and the split that the features depend on."""
    exclude = {"source", "val_source", "limit", "image_size"}
    return result_settings(recipe.corpus, exclude) | {
        "source": recipe.features.source,
        "seed": recipe.seed,
    }


def make(run: StageRun, encoder: Artifact) -> dict[str, int]:
    """The body of the stage.

    Counts: images, vectors, train, val (vectors of each split), dim, groups, quarantined, found.

    Raises:
        DataError: if the source cannot be found or has no image to train on, or the folder holds
            shards of other groups.
    """
    recipe = run.recipe
    path, model = open_parent(recipe, encoder)
    groups = [
        listed(group, storage.join(run.path, LISTED, f"{number:05d}.json"))
        for number, group in enumerate(
            find_groups(recipe.features.source, recipe.corpus, recipe.seed)
        )
    ]
    existing = _existing_shards(run.path, len(groups))
    counts = Counter({"images": 0, "vectors": 0, "train": 0, "val": 0, "quarantined": 0})
    args = (run.path, path, recipe, model.image_size)
    dim = model.dim
    del model
    with ensure_ray(recipe), shard_progress(run, len(groups), "groups") as (tally, update):
        items = [(number, group, existing.get(number, [])) for number, group in enumerate(groups)]
        for note in run_shards(items, FeatureGroup, args, recipe.resources, tally=tally):
            counts.update({"images": note["images"], "quarantined": sum(note["lost"].values())})
            for key, rows in note["shards"].items():
                counts.update({"vectors": rows, key.split("/")[0]: rows})
            counts.update(
                {f"quarantined/{reason}": number for reason, number in note["lost"].items()}
            )
            update(1, images=counts["images"], quarantined=counts["quarantined"])
    if not counts["train"]:
        raise DataError(
            f"{recipe.features.source} has no image to train on ({counts['quarantined']:,} in "
            f"quarantine, {counts['images']:,} held out). See {run.path}/quarantine, or set "
            "features.source."
        )
    log_second_images(run, counts)
    storage.remove(storage.join(run.path, LISTED))
    found = counts["images"] + counts["quarantined"]
    return {**counts, "dim": dim, "groups": len(groups), "found": found}


class FeatureGroup:
    """Actor: writes a group's feature shards and quarantine; returns its record."""

    def __init__(self, out: str, encoder: str, recipe: Recipe, image_size: int) -> None:
        self.out = out
        self.encoder_dir = encoder
        self.recipe = recipe
        self.image_size = image_size
        self.featurizer: Featurizer | None = None

    def read(self, item: GroupItem) -> GroupItem:
        """Load the group's listing; `work` reads its images in blocks."""
        number, group, existing = item
        return number, group.load() if isinstance(group, ListedGroup) else group, existing

    def work(self, item: GroupItem) -> GroupRecord:
        number, group, existing = item
        path = storage.join(self.out, "groups", f"{number:05d}.json")
        digest = hashlib.sha256(repr(group).encode()).hexdigest()
        if storage.exists(path):
            note: GroupRecord = storage.read_json(path)
            if note["group"] == digest:
                PROCESS_TALLY.count("kept")
                return note
            PROCESS_TALLY.count("remade")
        self.forget(number, existing, path)
        note = {"group": digest, "images": 0, "shards": {}, "lost": {}}
        lost: list[dict[str, str]] = []
        with reading(group.source):
            for piece, block in enumerate(self.blocks(group, lost)):
                note["images"] += len(block)
                note["shards"] |= self.write(f"{number:05d}-{piece:03d}", block, group.source)
        if lost:
            shards.write_shard(
                self.out,
                shards.shard_key("quarantine", number),
                pa.Table.from_pylist(lost, shards.QUARANTINE),
            )
        note["lost"] = dict(Counter(row["reason"] for row in lost))
        storage.write_json(path, note)
        return note

    def forget(self, number: int, existing: list[str], path: str) -> None:
        """Remove the files of this number, of another group or of an interrupted run."""
        for key in existing:
            storage.remove(shards.shard_path(self.out, key))
        storage.remove(shards.shard_path(self.out, shards.shard_key("quarantine", number)))
        storage.remove(path)

    def blocks(
        self, group: Group, lost: list[dict[str, str]]
    ) -> Iterator[list[tuple[str, np.ndarray]]]:
        """Yield (image_id, pixels uint8 (S, S, 3)) of usable images, in blocks of a shard.

        The others are added to `lost`.
        """
        block: list[tuple[str, np.ndarray]] = []
        for found in PROCESS_TALLY.timed("read", group.samples()):
            with PROCESS_TALLY.part("decode"):
                one = self.decode(found)
            if isinstance(one, Unusable):
                row = {"source": group.source, "key": printable(one.key), "reason": one.reason}
                lost.append(row | {"detail": printable(one.detail)})
                continue
            block.append(one)
            if len(block) == self.recipe.corpus.shard_images:
                yield block
                block = []
        if block:
            yield block

    def decode(self, found: Sample | Unusable) -> tuple[str, np.ndarray] | Unusable:
        section = self.recipe.corpus
        if isinstance(found, Unusable):
            return found
        try:
            check_file(found, section) if section.max_aspect is None else check_image(
                found, section
            )
            pixels = images.to_pixels(
                found.data,
                self.image_size,
                max_pixels=section.max_pixels,
                min_size=section.min_size,
            )
        except ImageError as error:
            return Unusable(found.key, error.reason, str(error))
        return image_id(found.data), pixels

    def write(self, name: str, block: list[tuple[str, np.ndarray]], where: str) -> dict[str, int]:
        """Write a block's shards, train and val; returns the rows of each."""
        if self.featurizer is None:
            self.featurizer = Featurizer(self.encoder_dir, self.recipe)
        written = {}
        for split in shards.SPLITS:
            part = [
                one
                for one in block
                if is_held_out(one[0], self.recipe.corpus.val_fraction) == (split == "val")
            ]
            if not part:
                continue
            pixels = np.stack([pixels for _, pixels in part])
            rows = self.featurizer.rows(pixels, [identity for identity, _ in part], where)
            with PROCESS_TALLY.part("write"):
                written[f"{split}/{name}"] = shards.write_shard(
                    self.out, f"{split}/{name}", rows
                ).rows
        return written


def _existing_shards(path: str, num_groups: int) -> dict[int, list[str]]:
    """Existing shards by the number of their group.

    Raises:
        DataError: if a shard belongs to no group of the source.
    """
    numbers = {f"{number:05d}": number for number in range(num_groups)}
    existing: dict[int, list[str]] = {}
    foreign: list[str] = []
    for key in shards.list_shards(path):
        number = numbers.get(key.split("/")[1].partition("-")[0])
        (foreign if number is None else existing.setdefault(number, [])).append(key)
    if foreign:
        raise DataError(
            f"{path} holds {len(foreign):,} shards that belong to no group of the source; the "
            f"first is {shards.shard_path(path, foreign[0])}. Move them away, then run the same "
            "command to resume."
        )
    return existing
