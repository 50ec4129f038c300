"""Stage `features`: shards of the frozen encoder's patch features.

All patches are kept, or a seeded sample per image.
"""

from __future__ import annotations

from functools import partial

from smalti import shards
from smalti.artifact import Artifact
from smalti.schema import Recipe, result_settings
from smalti.tracking import Tracker
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.features import from_source
from smalti.workflows.features.featurizer import FeatureShard, open_parent
from smalti.workflows.pipeline.finished_shards import refuse_foreign
from smalti.workflows.pipeline.pixels import block_bytes
from smalti.workflows.pipeline.shards import run_shards
from smalti.workflows.pipeline.stage import Body, StageRun, find_artifact, run_stage
from smalti.workflows.pipeline.timings import shard_progress


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The features artifact: a shard of float16 patch vectors per corpus shard.

    With `features.source` the shards are created directly from that source (`from_source`), without
    a corpus.

    Counts: images, vectors, train, val (vectors of each split), dim.

    Raises:
        DataError: if a feature is NaN or Inf.
    """
    config = result_settings(recipe.features, ("source",)) | {"layer": recipe.encoder.layer}
    if recipe.features.patches != "all":
        config["seed"] = recipe.seed
    parents = {"encoder": find_artifact(recipe, "encoder")}
    if recipe.features.source:
        config |= from_source.source_config(recipe)
        body: Body = partial(from_source.make, encoder=parents["encoder"])
    else:
        parents = {"corpus": find_artifact(recipe, "corpus"), **parents}
        body = _body(parents)
    return run_stage(recipe, "features", "features", config, parents, body, tracker=tracker)


def _body(parents: dict[str, Artifact]) -> Body:
    def body(run: StageRun) -> dict[str, int]:
        recipe = run.recipe
        corpus = parents["corpus"]
        encoder, model = open_parent(recipe, parents["encoder"])
        keys = shards.list_shards(corpus.path)
        refuse_foreign(run.path, keys)
        counts = {"images": 0, "vectors": 0, "train": 0, "val": 0, "dim": model.dim}
        args = (run.path, corpus.path, encoder, recipe, model.image_size)
        del model
        with ensure_ray(recipe), shard_progress(run, corpus.counts["images"]) as (tally, update):
            block = block_bytes(recipe, args[-1])
            for receipt, num_images in run_shards(
                keys, FeatureShard, args, recipe.resources, tally=tally, block_bytes=block
            ):
                update(num_images)
                counts["images"] += num_images
                counts["vectors"] += receipt.rows
                counts[receipt.key.split("/")[0]] += receipt.rows
        return counts

    return body
