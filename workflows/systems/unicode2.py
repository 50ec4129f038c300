"""UniCode²'s tokenizer: the frozen encoder and the clustered codebook put together; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from smalti.artifact import Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import Recipe, TokenizerSection
from smalti.tokenizers.codebook import load_index
from smalti.tokenizers.encoders import open_encoder
from smalti.workflows.encoder import encoder_path
from smalti.workflows.pipeline.stage import StageRun


def parents(recipe: Recipe) -> tuple[str, ...]:
    """The frozen encoder and the codes."""
    return ("encoder", "codebook")


def check(recipe: Recipe) -> None:
    """ConfigError: keys of other systems, or an adapter for code vectors of two parts."""
    plain = TokenizerSection()
    strange = [
        name for name in TokenizerSection.model_fields if getattr(recipe.tokenizer, name) != getattr(plain, name)
    ]
    if strange:
        raise ConfigError(
            f"system=unicode2 trains no tokenizer, but the recipe sets {', '.join(f'tokenizer.{name}' for name in strange)}: "
            "keys of other systems. Take them out; the codebook is set in `codebook` and `features`."
        )
    if recipe.mllm.adapter == "dual":
        raise ConfigError(
            "mllm.adapter=dual needs code vectors of two parts, and a code of unicode2 has one. Set mllm.adapter=cascade (a "
            "trained codebook beside the frozen one) or single (the frozen one alone)."
        )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What the tokenizer depends on, of the recipe, beside its parents."""
    own = {
        "layer": recipe.encoder.layer,
        "image_size": recipe.corpus.image_size,
        "spherical": recipe.codebook.spherical,
    }
    return {"system": recipe.system} | own


def body(parents: Mapping[str, Artifact]) -> Any:
    def make(run: StageRun) -> dict[str, int]:
        from smalti.tokenizers.unicode2 import Unicode2

        recipe, path = run.recipe, encoder_path(parents["encoder"])
        encoder = open_encoder(path, recipe.encoder.layer)
        if encoder.image_size != recipe.corpus.image_size:
            raise ConfigError(
                f"corpus.image_size={recipe.corpus.image_size}, but the encoder {path} reads {encoder.image_size} px. Set "
                f"corpus.image_size={encoder.image_size}."
            )
        index = load_index(parents["codebook"].path)
        bad = sum(int((~torch.isfinite(part.sum(-1))).sum()) for part in index.codes.split(1 << 16))
        if bad:
            raise DataError(
                f"{bad} of {len(index.codes)} codes of {parents['codebook'].path} are NaN or Inf. Remove it and run the stage "
                "`codebook` again."
            )
        whole = Unicode2(encoder, index, spherical=recipe.codebook.spherical)
        whole.save_pretrained(run.path)
        return {"num_codes": whole.num_codes, "tokens": whole.num_tokens}

    return make
