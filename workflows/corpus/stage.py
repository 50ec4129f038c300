"""Stage `corpus`: check, deduplicate and split images; write them as shards.

Unusable images are listed in quarantine. Two passes over the source, both on Ray. The first
(`scan`) decodes every image once and writes an index without pixels, one file per group of input
(`index`). From the indexes duplicates are found by a shuffle over files (`dedup`), and the shards
are planned from counts (`layout`): a pure function of the source, so that neither the number of
tasks nor an interruption changes the result. The second pass (`write`) reads the bytes again and
writes the shards. The driver holds a few numbers per group and per shard, never the images' ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from smalti import shards, storage
from smalti.artifact import Artifact
from smalti.errors import DataError
from smalti.progress import log
from smalti.schema import Recipe, result_settings
from smalti.tracking import Tracker
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.corpus.index import log_second_images
from smalti.workflows.corpus.scan import check_and_plan
from smalti.workflows.corpus.write import GONE, LISTING, counted, write_shards
from smalti.workflows.pipeline.stage import StageRun, run_stage, stage_path
from smalti.workflows.pipeline.timings import PROCESS_TALLY, tallied
from smalti.workflows.sources import Group, find_groups, listed

# folders that are removed from the finished artifact
WORK = (
    "index",
    "ids",
    "copies",
    "gifts",
    "marks",
    GONE,
)
MAX_RELISTED = 1_000_000
LISTED = "listed"  # another: the listing of a folder, one file per group; written by each run


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The corpus artifact: `train/`, `val/` and `quarantine/` shards.

    Counts: images, train, val, quarantined, over_limit, found (their sum), `quarantined/<reason>`,
    and `without_caption` if there are such images.

    Raises:
        DataError: if the source cannot be found, or has no usable image to train on.
    """
    path = stage_path(recipe, "corpus")
    stood = Artifact.find(path) is not None
    made = run_stage(recipe, "corpus", "corpus", stage_config(recipe), {}, _body, tracker=tracker)
    if made.path == path:  # only now that the artifact is finished
        for name in set(storage.list_names(path)).intersection({*WORK, LISTED}):
            storage.remove(storage.join(path, name))
    if stood:
        _log_change(recipe, made)
    return made


def stage_config(recipe: Recipe) -> dict[str, object]:
    """Settings that the corpus depends on.

    `image_size` is used only when shards are read, except by generated pictures.
    """
    section = recipe.corpus
    config = result_settings(section, ("image_size",))
    if section.format == "generated" or any(
        one.partition(":")[0] == "generated" for one in sources_of(recipe)
    ):
        config |= {"image_size": recipe.corpus.image_size, "seed": recipe.seed}
    return config


def sources_of(recipe: Recipe) -> list[str]:
    """Every source that the recipe names."""
    given = [recipe.corpus.source, recipe.corpus.val_source]
    return [name for one in given for name in ([one] if isinstance(one, str) else one or [])]


def _body(run: StageRun) -> dict[str, int]:
    with tallied(run) as tally:
        with tally.part("list"):
            PROCESS_TALLY.drain()  # drops what an earlier run in this process counted
            groups, listing = _groups(run.recipe, storage.join(run.path, LISTED))
            tally.add(PROCESS_TALLY.drain())
            _same_listing(run, listing)
        with ensure_ray(run.recipe):
            places, plan = check_and_plan(run, tally, groups)
            written, bare = write_shards(run, tally, groups, places, plan)
    counts = counted(run.path, plan) | ({"without_caption": bare} if bare else {})
    _check(run, counts, written)
    return counts


def _groups(
    recipe: Recipe, folder: str | None = None
) -> tuple[dict[str, list[Group]], dict[str, str]]:
    """The groups of each source, the held-out one first, and a digest of the listing.

    The digest covers file names and metadata, not the files' bytes. Long records are written to
    `folder`; without one only the digest is returned.
    """
    section = recipe.corpus
    digest = hashlib.sha256()
    sources = {"val": section.val_source} if section.val_source else {}
    groups: dict[str, list[Group]] = {}
    for split, source in {**sources, "train": section.source}.items():
        digest.update(split.encode())
        members = groups.setdefault(split, [])
        for group in find_groups(source, section, recipe.seed):
            digest.update(repr(group).encode())
            if folder is not None:
                members.append(
                    listed(
                        group, storage.join(folder, f"{shards.shard_key(split, len(members))}.json")
                    )
                )
    return groups, {"listing": digest.hexdigest()}


def _log_change(recipe: Recipe, made: Artifact) -> None:
    """Log if the source lists other files than when a finished corpus was created.

    The fingerprint covers only settings. Checked where it is cheap: on local disks and up to
    `MAX_RELISTED` images. A missing source is not a change.
    """
    path = storage.join(made.path, LISTING)
    cheap = made.counts["found"] <= MAX_RELISTED and all(
        storage.is_local(name) for name in sources_of(recipe)
    )
    if not cheap or not storage.exists(path):
        return
    try:
        changed = storage.read_json(path) != _groups(recipe)[1]
    except DataError:
        return
    if changed:
        log(
            "corpus: the source now lists other files than when the corpus was created; remove "
            f"{made.path} to create it again"
        )


def _same_listing(run: StageRun, listing: Mapping[str, str]) -> None:
    """Start over if the source changed since the interrupted run."""
    path = storage.join(run.path, LISTING)
    if storage.exists(path) and storage.read_json(path) == listing:
        return
    if run.resumed:
        if storage.exists(path):
            run.log("the source has changed since the interrupted run: starting over")
        _clear(run.path)
    storage.write_json(path, listing)


def _clear(path: str) -> None:
    """Remove all that the stage wrote."""
    for name in (LISTING, *WORK, "train", "val", "quarantine"):
        storage.remove(storage.join(path, name))


def _check(run: StageRun, counts: dict[str, int], written: Mapping[str, int]) -> None:
    """Check that the counts add up and that training has images; log the quarantine.

    `written`: the rows of each shard, from the receipts.

    Raises:
        DataError: if no image is usable, or all of them are held out.
    """
    kept = sum(written.values())
    assert kept == counts["images"], f"{kept} rows in shards, {counts['images']} planned"
    gone = counts["quarantined"] + counts["over_limit"] + counts.get("merged", 0)
    assert kept + gone == counts["found"], counts
    reasons = [
        f"{count:,} {name.partition('/')[2]}" for name, count in counts.items() if "/" in name
    ]
    unusable = ", ".join(reasons) or "none"
    section = run.recipe.corpus
    if not counts["images"]:
        lost = shards.list_shards(run.path, "quarantine")[:1]
        rows = [
            row for key in lost for row in shards.read_shard(run.path, key).slice(0, 3).to_pylist()
        ]
        examples = "; ".join(f"{row['key']}: {row['detail']}" for row in rows)
        raise DataError(
            f"The corpus has 0 usable images of {counts['found']:,} found in {section.source} "
            f"(unusable: {unusable}). {examples + '. ' if examples else ''}See "
            f"{run.path}/quarantine, or set corpus.source."
        )
    if not counts["train"]:
        _clear(run.path)
        fix = (
            "Name another corpus.val_source" if section.val_source else "Lower corpus.val_fraction"
        )
        raise DataError(f"No image is left to train on: all {counts['val']:,} are held out. {fix}.")
    if not counts["val"] and (section.val_source or section.val_fraction):
        run.log("no image is held out: raise corpus.val_fraction, or set corpus.val_source")
    log_second_images(run, counts)
    if counts["quarantined"]:
        run.log(
            f"{counts['quarantined']:,} of {counts['found']:,} in quarantine ({unusable}); see "
            f"{run.path}/quarantine"
        )
