"""Stage `bridge`: token shards with captions, and the language model's codebook → the conditioning
of a diffusion decoder.
"""

from __future__ import annotations

import math
import os
from typing import Any

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


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The bridge artifact; see `smalti.mllm.bridge.load_bridge`.

    Counts: pairs of an image with its caption, steps.

    Errors: ConfigError without `bridge.decoder` or for another system, DataError without a
    captioned image.
    """
    if recipe.bridge is None:
        raise ConfigError(
            "bridge.decoder is not set: name a text-to-image pipeline of diffusers, a folder or hub name."
        )
    check(recipe)
    parents = {name: find_artifact(recipe, name) for name in ("tokenizer", "tokens", "mllm")}
    config = result_settings(recipe.bridge) | {
        "seed": recipe.seed,
        "decoder": resolve(recipe.bridge.decoder),
    }
    return run_stage(recipe, "bridge", "bridge", config, parents, _body(parents), tracker=tracker)


def check(recipe: Recipe) -> None:
    """ConfigError: a system without a codebook of its own in the language model, or batches that
    workers cannot share.
    """
    if recipe.bridge is None:
        return
    if not system_of(recipe).bridges or recipe.mllm.adapter != "cascade":
        raise ConfigError(
            f"bridge.decoder={recipe.bridge.decoder} is set, but system={recipe.system} with mllm.adapter="
            f"{recipe.mllm.adapter}: a bridge reads the trained codebook of system=unicode2, mllm.adapter=cascade. Remove "
            "`bridge`."
        )
    check_batch("bridge", recipe.bridge.train, recipe.resources, together="InfoNCE")


def _body(parents: dict[str, Artifact]) -> Any:
    def body(run: StageRun) -> dict[str, int]:
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

    return body


def captioned(tokens: str) -> tuple[list[str], list[int]]:
    """Training shards of tokens, and in each the rows with a caption. DataError: none at all."""
    from smalti.workflows.train.tasks.bridge import CAPTIONED
    from smalti.workflows.train.tasks.mllm import usable_rows

    keys = shards.list_shards(tokens, "train")
    sizes = [
        len(usable_rows(shards.read_shard(tokens, key, ["caption", "label", "qa"]), CAPTIONED))
        for key in keys
    ]
    if not sum(sizes):
        raise DataError(
            f"No image of {tokens} has a caption, and a bridge learns from captions. Take `bridge` out."
        )
    return keys, sizes


def trained_codes(mllm: str) -> Any:
    """The second codebook of the language model in an mllm artifact's folder: float32 (V, C)."""
    from safetensors import safe_open

    from smalti.mllm.build import WEIGHTS

    with (
        storage.local_copy(storage.join(mllm, "model", WEIGHTS)) as file,
        safe_open(file, framework="pt") as tensors,
    ):
        return tensors.get_tensor("adapter.codes.weight").float().clone()


def copy_into(bridge: str, folder: str) -> None:
    """A bridge into the local folder `<folder>/bridge`, as `load_bridge` reads it."""
    from smalti.mllm.bridge import CODES, SETTINGS, WEIGHTS

    os.makedirs(os.path.join(folder, "bridge"), exist_ok=True)
    for name in (CODES, WEIGHTS, SETTINGS):
        storage.get_file(storage.join(bridge, name), os.path.join(folder, "bridge", name))
