"""Patch features of images, computed by the encoder on an actor's device."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from smalti import shards
from smalti.artifact import Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import Recipe
from smalti.tokenizers.encoders import VisionEncoder, open_encoder
from smalti.workflows.cluster.devices import actor_device
from smalti.workflows.encoder import encoder_path
from smalti.workflows.pipeline.finished_shards import matching_receipt
from smalti.workflows.pipeline.pixels import LoadedShard, load_pixels
from smalti.workflows.pipeline.timings import PROCESS_TALLY


def choose_patches(identity: str, seed: int, num: int, total: int) -> np.ndarray:
    """`num` of `total` patches of an image: sorted int32.

    Drawn by a hash of seed and image_id, so that they are always the same.
    """
    digest = hashlib.sha256(f"{seed}/{identity}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return np.sort(rng.permutation(total)[:num]).astype(np.int32)


class FeatureShard:
    """Actor: writes the feature shard of a corpus shard; returns (receipt, images)."""

    def __init__(
        self, out: str, corpus: str, encoder: str, recipe: Recipe, image_size: int
    ) -> None:
        self.out = out
        self.corpus = corpus
        self.encoder_dir = encoder
        self.recipe = recipe
        self.image_size = image_size
        self.featurizer: Featurizer | None = None

    def read(self, key: str) -> shards.Receipt | LoadedShard:
        done = matching_receipt(self.out, self.corpus, key)
        if done is not None:
            return done
        max_pixels = self.recipe.corpus.max_pixels
        return LoadedShard(
            key, *load_pixels(self.corpus, key, self.image_size, max_pixels, ["image_id"])
        )

    def work(self, loaded: shards.Receipt | LoadedShard) -> tuple[shards.Receipt, int]:
        if isinstance(loaded, shards.Receipt):
            return loaded, shards.shard_rows(self.corpus, loaded.key)
        key, table, pixels = loaded
        ids = table.column("image_id").to_pylist()
        if self.featurizer is None:
            self.featurizer = Featurizer(self.encoder_dir, self.recipe)
        rows = self.featurizer.rows(pixels, ids, shards.shard_path(self.corpus, key))
        with PROCESS_TALLY.part("write"):
            return shards.write_shard(self.out, key, rows), len(ids)


class Featurizer:
    """A recipe's encoder on the actor's device, and its selection of patches."""

    def __init__(self, encoder_dir: str, recipe: Recipe) -> None:
        from smalti.tokenizers.encoders import as_set

        self.encoder_dir = encoder_dir
        self.recipe = recipe
        self.device = actor_device(recipe.resources)
        with PROCESS_TALLY.part("start"):
            encoder = open_encoder(encoder_dir, recipe.encoder.layer).to(self.device)
        self.dim: int = encoder.dim
        self.encode = as_set(
            encoder, self.device, recipe.features.precision, recipe.features.compile
        )

    def rows(self, pixels: np.ndarray, ids: list[str], where: str) -> pa.Table:
        """Feature rows of images, of all patches or the sampled ones.

        One batch's features are in memory at a time.

        Args:
            pixels: uint8 (B, S, S, 3).
            where: the file, for errors.

        Raises:
            DataError: naming the first image with a feature that is not finite in float16.
        """
        import torch

        from smalti.tokenizers.encoders import batches, on_host

        size = self.recipe.features.batch_size
        parts = []
        chosen = []
        with PROCESS_TALLY.part("model"), torch.inference_mode():
            results = on_host(
                self.encode(part).half() for part in batches(pixels, size, self.device)
            )
            for start, result in zip(range(0, len(ids), size), results, strict=True):
                names = ids[start : start + size]
                vectors_BNC = result.numpy()
                self.check(vectors_BNC, names, where)
                chosen_BM = self.choose(names, vectors_BNC.shape[1])
                parts.append(np.take_along_axis(vectors_BNC, chosen_BM[:, :, None], axis=1))
                chosen.append(chosen_BM)
        patches_BM = np.concatenate(chosen) if chosen else np.empty((0, 0), np.int32)
        vectors = (
            np.concatenate(parts).reshape(-1, self.dim)
            if parts
            else np.empty((0, self.dim), np.float16)
        )
        arrays = [
            pa.array(np.repeat(np.array(ids, object), patches_BM.shape[1]), pa.string()),
            pa.array(patches_BM.reshape(-1), pa.int32()),
            shards.list_column(vectors),
        ]
        return pa.table(arrays, shards.feature_schema(self.dim))

    def choose(self, ids: list[str], total: int) -> np.ndarray:
        """Selected patches of each image: sorted int32 (B, M)."""
        wanted = self.recipe.features.patches
        if wanted == "all" or wanted >= total:
            return np.tile(np.arange(total, dtype=np.int32), (len(ids), 1))
        return np.stack([choose_patches(one, self.recipe.seed, wanted, total) for one in ids])

    def check(self, vectors_BNC: np.ndarray, ids: list[str], where: str) -> None:
        """Check that the features are finite in float16.

        Raises:
            DataError: naming the first image of which they are not.
        """
        bad = ~np.isfinite(vectors_BNC).all(axis=(1, 2))
        if bad.any():
            raise DataError(
                f"{where}: image {ids[int(bad.argmax())]} has features that are NaN, Inf or beyond "
                f"float16 (65,504), as {int(bad.sum())} of the {len(ids)} images of its batch. "
                f"Check the encoder {self.encoder_dir}, or choose another encoder.layer."
            )


def open_parent(recipe: Recipe, encoder: Artifact) -> tuple[str, VisionEncoder]:
    """The encoder's folder and the encoder.

    Raises:
        ConfigError: if `features.patches` is more than the encoder has per image.
    """
    path = encoder_path(encoder)
    model = open_encoder(path, recipe.encoder.layer)
    total = model.grid[0] * model.grid[1]
    if recipe.features.patches != "all" and recipe.features.patches > total:
        raise ConfigError(
            f"features.patches={recipe.features.patches}, but {path} gives {total} patches per "
            f"image. Set features.patches to at most {total}, or to all."
        )
    return path, model
