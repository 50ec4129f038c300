"""UniCode²'s tokenizer: the frozen encoder and the clustered codebook.

Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from smalti.artifact import Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import Recipe
from smalti.tokenizers.codebook import load_index
from smalti.tokenizers.encoders import VisionEncoder, open_encoder
from smalti.tokenizers.unicode2 import NO_DECODER, Unicode2
from smalti.workflows.encoder import encoder_path
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.plan.inference_cost import InferenceCost
from smalti.workflows.plan.models import Model
from smalti.workflows.plan.unicode2 import search_costs
from smalti.workflows.systems.base import System


class Unicode2System(System):
    """UniCode²: the frozen encoder and a large clustered codebook."""

    name = "unicode2"
    reads = ()
    bridges = True
    unmeasured: ClassVar[Mapping[str, str]] = {"reconstruction": NO_DECODER}

    def parents(self, recipe: Recipe) -> tuple[str, ...]:
        """The frozen encoder and the codebook."""
        return ("encoder", "codebook")

    def check(self, recipe: Recipe) -> None:
        """Also check that the adapter takes code vectors of one part."""
        super().check(recipe)
        if recipe.mllm.adapter == "dual":
            raise ConfigError(
                "mllm.adapter=dual needs code vectors of two parts, but a code of unicode2 has "
                "one. Set mllm.adapter=cascade (a trained codebook beside the frozen one) or "
                "single (the frozen one alone)."
            )

    def settings(self, recipe: Recipe) -> dict[str, object]:
        """Layer, image size, and whether codes are unit vectors."""
        own: dict[str, object] = {
            "layer": recipe.encoder.layer,
            "image_size": recipe.corpus.image_size,
            "spherical": recipe.codebook.spherical,
        }
        return {"system": recipe.system, **own}

    def build(self, run: StageRun, parents: Mapping[str, Artifact]) -> Mapping[str, int]:
        """Write the encoder and the codebook as one tokenizer."""
        recipe = run.recipe
        path = encoder_path(parents["encoder"])
        encoder = open_encoder(path, recipe.encoder.layer)
        if encoder.image_size != recipe.corpus.image_size:
            raise ConfigError(
                f"corpus.image_size={recipe.corpus.image_size}, but the encoder {path} reads "
                f"{encoder.image_size} px. Set corpus.image_size={encoder.image_size}."
            )
        index = load_index(parents["codebook"].path)
        bad = sum(int((~torch.isfinite(part.sum(-1))).sum()) for part in index.codes.split(1 << 16))
        if bad:
            raise DataError(
                f"{bad} of {len(index.codes)} codes of {parents['codebook'].path} are NaN or Inf. "
                "Remove it and run the stage `codebook` again."
            )
        whole = Unicode2(encoder, index, spherical=recipe.codebook.spherical)
        whole.save_pretrained(run.path)
        return {"num_codes": whole.num_codes, "tokens": whole.num_tokens}

    def smoke(self, recipe: Recipe) -> dict[str, object]:
        """Empty: no tokenizer is trained."""
        return {}

    def code_vectors(self, recipe: Recipe, encoder: VisionEncoder) -> tuple[int, tuple[int, ...]]:
        """K codes, as wide as a feature."""
        return recipe.codebook.size, (encoder.dim,)

    def tokenizer_models(self, recipe: Recipe, *, gpu: bool) -> Iterator[Model]:
        """None."""
        yield from ()

    def inference_costs(
        self, recipe: Recipe, encoder: VisionEncoder, trained: Mapping[str, Model]
    ) -> dict[str, InferenceCost]:
        """Features by the encoder; tokens also by the search for codes."""
        return search_costs(recipe, encoder)
