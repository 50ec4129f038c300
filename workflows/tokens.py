"""Stage `tokens`: corpus shards to shards of visual codes.

Shards keep their names, and rows their texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from smalti import shards
from smalti.artifact import Artifact
from smalti.errors import DataError
from smalti.schema import Recipe, result_settings
from smalti.tracking import Tracker
from smalti.workflows.cluster.devices import actor_device
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.pipeline.finished_shards import matching_receipt, refuse_foreign
from smalti.workflows.pipeline.pixels import LoadedShard, block_bytes, load_pixels
from smalti.workflows.pipeline.shards import run_shards
from smalti.workflows.pipeline.stage import Body, StageRun, find_artifact, run_stage
from smalti.workflows.pipeline.timings import PROCESS_TALLY, shard_progress

if TYPE_CHECKING:
    from torch import Tensor

CARRIED = ["image_id", "caption", "label", "qa"]


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The tokens artifact: codes int32 of every image, train and val.

    Counts: images, train, val, codes, num_codes.
    """
    parents = {name: find_artifact(recipe, name) for name in ("corpus", "tokenizer")}
    return run_stage(
        recipe,
        "tokens",
        "tokens",
        result_settings(recipe.tokens),
        parents,
        _body(parents),
        tracker=tracker,
    )


class EncodeShard:
    """Actor: writes the token shard of a corpus shard; returns its receipt."""

    def __init__(
        self, out: str, corpus: str, tokenizer: str, recipe: Recipe, image_size: int
    ) -> None:
        self.out = out
        self.corpus = corpus
        self.tokenizer_dir = tokenizer
        self.recipe = recipe
        self.image_size = image_size
        self.encoder: Callable[[Tensor], Tensor] | None = None

    def read(self, key: str) -> shards.Receipt | LoadedShard:
        done = matching_receipt(self.out, self.corpus, key)
        if done is not None:
            return done
        max_pixels = self.recipe.corpus.max_pixels
        return LoadedShard(
            key, *load_pixels(self.corpus, key, self.image_size, max_pixels, CARRIED)
        )

    def work(self, loaded: shards.Receipt | LoadedShard) -> shards.Receipt:
        if isinstance(loaded, shards.Receipt):
            return loaded
        key, table, pixels = loaded
        if self.encoder is None:
            self.encoder = self.load()
        with PROCESS_TALLY.part("model"):
            codes = self.encode(pixels, self.encoder)
        schema = shards.token_schema(codes.shape[1:])
        arrays = {name: table.column(name) for name in CARRIED} | {
            "codes": shards.list_column(codes)
        }
        with PROCESS_TALLY.part("write"):
            return shards.write_shard(
                self.out, key, pa.table([arrays[name] for name in schema.names], schema)
            )

    def load(self) -> Callable[[Tensor], Tensor]:
        """The tokenizer's `encode` on the actor's device."""
        from smalti.tokenizers.encoders import as_set
        from smalti.tokenizers.loading import load_tokenizer

        self.device = actor_device(self.recipe.resources)
        with PROCESS_TALLY.part("start"):
            tokenizer = load_tokenizer(self.tokenizer_dir).to(self.device)
        self.num_codes = tokenizer.num_codes
        return as_set(
            tokenizer.encode, self.device, self.recipe.tokens.precision, self.recipe.tokens.compile
        )

    def encode(self, pixels: np.ndarray, encoder: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Codes of the images: int32 (images, …).

        Raises:
            DataError: if the tokenizer returns a code out of its range.
        """
        import torch

        from smalti.tokenizers.encoders import batches, on_host

        size = self.recipe.tokens.batch_size
        with torch.inference_mode():
            codes = torch.cat(
                list(on_host(encoder(part) for part in batches(pixels, size, self.device)))
            )
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.num_codes:
            raise DataError(
                f"{self.tokenizer_dir} gave codes from {low} to {high}; expected 0 to "
                f"{self.num_codes - 1}. The tokenizer is damaged: remove its folder and run the "
                "stage `tokenizer` again."
            )
        return codes.to(torch.int32).numpy()


def _body(parents: dict[str, Artifact]) -> Body:
    def body(run: StageRun) -> dict[str, int]:
        from smalti.tokenizers.loading import load_tokenizer

        recipe = run.recipe
        corpus = parents["corpus"]
        tokenizer = parents["tokenizer"].path
        model = load_tokenizer(tokenizer)
        args = (run.path, corpus.path, tokenizer, recipe, model.image_size)
        counts = {"images": 0, "train": 0, "val": 0, "num_codes": model.num_codes}
        del model
        keys = shards.list_shards(corpus.path)
        refuse_foreign(run.path, keys)
        with ensure_ray(recipe), shard_progress(run, corpus.counts["images"]) as (tally, update):
            block = block_bytes(recipe, args[-1])
            for receipt in run_shards(
                keys, EncodeShard, args, recipe.resources, tally=tally, block_bytes=block
            ):
                update(receipt.rows)
                counts["images"] += receipt.rows
                counts[receipt.key.split("/")[0]] += receipt.rows
        return counts

    return body
