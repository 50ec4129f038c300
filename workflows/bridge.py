"""Stage `bridge`: train the mapping from codes to the conditioning of a diffusion decoder.

It reads token shards with captions, and the codebook of the language model.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from smalti import shards, storage
from smalti.artifact import Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import Recipe, result_settings
from smalti.tokenizers import tensor_files
from smalti.tracking import Tracker
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.encoder import resolve
from smalti.workflows.pipeline.stage import StageRun, find_artifact, run_stage
from smalti.workflows.systems.registry import system_of
from smalti.workflows.train.elastic import check_batch

if TYPE_CHECKING:
    from torch import Tensor


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """Train the bridge of a recipe.

    Returns:
        The artifact; see `smalti.mllm.bridge.load_bridge`. Counts: pairs of an image with its
        caption, steps.

    Raises:
        ConfigError: if `bridge.decoder` is not set, or for a system without a bridge.
        DataError: if no image has a caption.
    """
    if recipe.bridge is None:
        raise ConfigError(
            "bridge.decoder is not set. Set it to the folder or hub name of a text-to-image "
            "pipeline of diffusers."
        )
    check(recipe)
    parents = {name: find_artifact(recipe, name) for name in ("tokenizer", "tokens", "mllm")}
    config = result_settings(recipe.bridge) | {
        "seed": recipe.seed,
        "decoder": resolve(recipe.bridge.decoder),
    }
    return run_stage(
        recipe,
        "bridge",
        "bridge",
        config,
        parents,
        lambda stage: _body(stage, parents),
        tracker=tracker,
    )


def check(recipe: Recipe) -> None:
    """Check the bridge section before the chain starts.

    Raises:
        ConfigError: if the language model has no codebook of its own, or if batches cannot be split
            over the workers.
    """
    if recipe.bridge is None:
        return
    if not system_of(recipe).bridges or recipe.mllm.adapter != "cascade":
        raise ConfigError(
            f"bridge.decoder={recipe.bridge.decoder} is set, but system={recipe.system} with "
            f"mllm.adapter={recipe.mllm.adapter}: a bridge reads the trained codebook of "
            "system=unicode2, mllm.adapter=cascade. Remove `bridge`."
        )
    check_batch("bridge", recipe.bridge.train, recipe.resources, together="InfoNCE")


def _body(run: StageRun, parents: dict[str, Artifact]) -> dict[str, int]:
    from smalti.mllm.bridge import CODES
    from smalti.tokenizers.saved import read_config
    from smalti.workflows.train.launch import fit
    from smalti.workflows.train.tasks.bridge import BridgeTask

    section = run.recipe.bridge
    assert section is not None
    section = section.model_copy(update={"decoder": resolve(section.decoder)})
    keys, sizes = captioned(parents["tokens"].path)
    codes = storage.join(run.path, CODES)
    if not storage.exists(codes):
        tensor_files.write(codes, {"codes": trained_codes(parents["mllm"].path)})
    settings = {
        "section": section,
        "tokens": parents["tokens"].path,
        "keys": keys,
        "sizes": sizes,
        "num_tokens": math.prod(read_config(parents["tokenizer"].path)["grid"]),
        "path": run.path,
    }
    with ensure_ray(run.recipe):
        fit(BridgeTask, settings, section.train, run, seed=run.recipe.seed)
    return {"pairs": sum(sizes), "steps": section.train.steps}


def captioned(tokens: str) -> tuple[list[str], list[int]]:
    """Training shards of tokens, and the number of rows with a caption in each.

    Raises:
        DataError: if no image has a caption.
    """
    from smalti.workflows.train.tasks.bridge import CAPTIONED
    from smalti.workflows.train.tasks.mllm import usable_rows

    keys = shards.list_shards(tokens, "train")
    sizes = [
        len(usable_rows(shards.read_shard(tokens, key, ["caption", "label", "qa"]), CAPTIONED))
        for key in keys
    ]
    if not sum(sizes):
        raise DataError(
            f"No image of {tokens} has a caption, but a bridge is trained on captions. Remove "
            "`bridge` from the recipe, or add captions to the corpus."
        )
    return keys, sizes


def trained_codes(mllm: str) -> Tensor:
    """The language model's codebook, from an mllm artifact's folder: float32 (V, C)."""
    from safetensors import safe_open

    from smalti.mllm.build import WEIGHTS

    with (
        storage.local_copy(storage.join(mllm, "model", WEIGHTS)) as file,
        safe_open(file, framework="pt") as tensors,
    ):
        return tensors.get_tensor("adapter.codes.weight").float().clone()


def copy_into(bridge: str, folder: str) -> None:
    """Copy a bridge into the local folder `<folder>/bridge`, where `load_bridge` reads it."""
    from smalti.mllm.bridge import CODES, SETTINGS, WEIGHTS

    os.makedirs(os.path.join(folder, "bridge"), exist_ok=True)
    for name in (CODES, WEIGHTS, SETTINGS):
        storage.get_file(storage.join(bridge, name), os.path.join(folder, "bridge", name))
