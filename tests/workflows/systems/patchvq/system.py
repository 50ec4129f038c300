"""The system `patchvq`: k-means over the patches of training images; there is nothing else to
train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from smalti.artifact import Artifact
from smalti.schema import Recipe
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.kmeans import kmeans
from smalti.tokenizers.patchvq import GRID, PatchVQ  # pyright: ignore[reportMissingImports]
from smalti.tokenizers.vit import patchify
from smalti.workflows.pipeline.pixels import load_pixels
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.plan.inference_cost import InferenceCost
from smalti.workflows.plan.models import Model
from smalti.workflows.systems.base import System
from smalti.workflows.train.data import shard_index


class PatchVQSystem(System):
    """PatchVQ: raw patches of pixels, clustered."""

    name = "patchvq"
    reads = ()
    ignores = ("features",)

    def parents(self, recipe: Recipe) -> tuple[str, ...]:
        """The images alone."""
        return ("corpus",)

    def settings(self, recipe: Recipe) -> dict[str, object]:
        """Codes, seed and image size."""
        own = {
            "size": recipe.codebook.size,
            "seed": recipe.seed,
            "image_size": recipe.corpus.image_size,
        }
        return {"system": recipe.system} | own

    def build(self, run: StageRun, parents: Mapping[str, Artifact]) -> Mapping[str, int]:
        """Cluster the patches of the first training shard, and write the tokenizer."""
        recipe = run.recipe
        corpus = parents["corpus"].path
        keys, _ = shard_index(corpus, "train")
        _, pixels_NHWC = load_pixels(
            corpus, keys[0], recipe.corpus.image_size, recipe.corpus.max_pixels, []
        )
        patches_NTP = patchify(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2) / 127.5 - 1, GRID)
        generator = torch.Generator().manual_seed(recipe.seed)
        codes_KP = kmeans(
            patches_NTP.flatten(0, 1), recipe.codebook.size, iterations=4, generator=generator
        )
        tokenizer = PatchVQ(codes_KP, recipe.corpus.image_size)
        tokenizer.save_pretrained(run.path)
        return {"num_codes": tokenizer.num_codes, "tokens": tokenizer.num_tokens}

    def smoke(self, recipe: Recipe) -> dict[str, object]:
        """Few codes."""
        return {"codebook.size": 16}

    def code_vectors(self, recipe: Recipe, encoder: VisionEncoder) -> tuple[int, tuple[int, ...]]:
        """K codes, as wide as a patch of pixels."""
        side = recipe.corpus.image_size // GRID[0]
        return recipe.codebook.size, (3 * side * side,)

    def tokenizer_models(self, recipe: Recipe, *, gpu: bool) -> Iterator[Model]:
        """None."""
        yield from ()

    def inference_costs(
        self, recipe: Recipe, encoder: VisionEncoder, trained: Mapping[str, Model]
    ) -> dict[str, InferenceCost]:
        """None that matters: a product of each patch with the codes."""
        cost = InferenceCost(
            flops={}, batch=recipe.tokens.batch_size, weights=0.0, first=0.0, further=1.0
        )
        return {"tokens": cost}
