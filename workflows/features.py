"""Stage `features`: corpus shards → shards of patch features of the frozen encoder, all or a seeded sample an image."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from smalti import images, shards, storage
from smalti.artifact import Artifact
from smalti.errors import ArtifactError, ConfigError, DataError, ImageError
from smalti.schema import Recipe
from smalti.tracking import Tracker
from smalti.workflows.ray_session import ensure_ray
from smalti.workflows.shard_pipeline import refuse_foreign, run_shards, standing_for
from smalti.workflows.stage import StageRun, find_artifact, run_stage


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The features artifact: a shard of patch vectors (float16) for each corpus shard, train and val.

    Counts: images, vectors, train, val (vectors of each split), dim. Errors: DataError on a NaN or Inf feature.
    """
    parents = {name: find_artifact(recipe, name) for name in ("corpus", "encoder")}
    config: dict[str, Any] = {"patches": recipe.features.patches, "layer": recipe.encoder.layer}
    if recipe.features.patches != "all":
        config["seed"] = recipe.seed
    return run_stage(recipe, "features", "features", config, parents, _body(parents), tracker=tracker)


def choose_patches(identity: str, seed: int, num: int, total: int) -> np.ndarray:
    """`num` of `total` patches of an image, sorted, int32: drawn by a hash of seed and image_id, so always the same."""
    digest = hashlib.sha256(f"{seed}/{identity}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return np.sort(rng.permutation(total)[:num]).astype(np.int32)


def load_pixels(corpus: str, key: str, size: int, max_pixels: int, columns: list[str]) -> tuple[pa.Table, np.ndarray]:
    """Some columns of a corpus shard and its images as uint8 (rows, size, size, 3). Errors: DataError, an image that
    cannot be decoded any more."""
    table = shards.read_shard(corpus, key, [*columns, "image"])
    pixels = np.empty((table.num_rows, size, size, 3), np.uint8)
    for row, data in enumerate(table.column("image")):
        try:
            pixels[row] = images.to_pixels(data.as_py(), size, max_pixels=max_pixels)
        except ImageError as error:
            identity = table.column("image_id")[row].as_py()
            raise DataError(
                f"{shards.shard_path(corpus, key)}: image {identity}: {error}. Make the corpus again."
            ) from error
    return table.drop_columns(["image"]), pixels


def batches(pixels: np.ndarray, size: int, device: Any) -> Any:
    """Pixels as the models want them: float32 (B, 3, H, W) in [-1, 1] on `device`, `size` at a time."""
    import torch

    for start in range(0, len(pixels), size):
        part = torch.from_numpy(pixels[start : start + size]).to(device)
        yield part.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def actor_device(gpus: float, cpus: int) -> Any:
    """The actor's device; on a CPU torch gets the actor's share of the cores."""
    import torch

    if gpus:
        return torch.device("cuda")
    torch.set_num_threads(cpus)
    return torch.device("cpu")


def open_encoder(path_or_name: str, layer: int) -> Any:
    """The frozen vision encoder of a local folder, a URL (copied first) or a hub name; that of a URL with its text side
    loaded, where it has one, since the copy does not stay."""
    from smalti.tokenizers.encoders import VisionEncoder

    if storage.is_local(path_or_name):
        return VisionEncoder.from_pretrained(storage.local_path(path_or_name), layer)
    with storage.local_copy(path_or_name) as folder:
        encoder = VisionEncoder.from_pretrained(folder, layer)
        with suppress(ArtifactError):
            encoder.prompt_embeddings(["a"])
        return encoder


class FeatureShard:
    """Actor: one corpus shard in, one feature shard on disk out; returns (receipt, images)."""

    def __init__(self, out: str, corpus: str, encoder: str, recipe: Recipe, image_size: int) -> None:
        self.out, self.corpus, self.encoder_dir, self.recipe = out, corpus, encoder, recipe
        self.image_size = image_size
        self.encoder: Any = None

    def read(self, key: str) -> tuple[str, shards.Receipt | None, Any, Any]:
        done = standing_for(self.out, self.corpus, key)
        if done is not None:
            return key, done, None, None
        section = self.recipe.corpus
        return key, None, *load_pixels(self.corpus, key, self.image_size, section.max_pixels, ["image_id"])

    def work(self, loaded: tuple[str, shards.Receipt | None, Any, Any]) -> tuple[shards.Receipt, int]:
        key, done, table, pixels = loaded
        if done is not None:
            return done, shards.shard_rows(self.corpus, key)
        vectors_BNC = self.encode(pixels)
        ids = table.column("image_id").to_pylist()
        self.check(vectors_BNC, key, ids)
        section, total = self.recipe.features, vectors_BNC.shape[1]
        num = total if section.patches == "all" else min(section.patches, total)
        every = np.arange(total, dtype=np.int32)
        chosen_BM = np.stack(
            [every if num == total else choose_patches(one, self.recipe.seed, num, total) for one in ids]
        )
        vectors = np.take_along_axis(vectors_BNC, chosen_BM[:, :, None], axis=1)
        arrays = [
            pa.array(np.repeat(np.array(ids, object), num), pa.string()),
            pa.array(chosen_BM.reshape(-1), pa.int32()),
            shards.list_column(vectors.reshape(-1, vectors.shape[-1])),
        ]
        rows = pa.table(arrays, shards.feature_schema(vectors.shape[-1]))
        return shards.write_shard(self.out, key, rows), len(ids)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Features of all patches: float16 (images, patches, dim)."""
        import torch

        resources = self.recipe.resources
        device = actor_device(resources.gpus_per_worker, resources.cpus_per_worker)
        if self.encoder is None:
            self.encoder = open_encoder(self.encoder_dir, self.recipe.encoder.layer).to(device)
        with torch.inference_mode():
            parts = [
                self.encoder(part).half().cpu() for part in batches(pixels, self.recipe.features.batch_size, device)
            ]
        return torch.cat(parts).numpy()

    def check(self, vectors_BNC: np.ndarray, key: str, ids: list[str]) -> None:
        """Errors: DataError naming the first image with a feature that is not finite in float16."""
        bad = ~np.isfinite(vectors_BNC).all(axis=(1, 2))
        if bad.any():
            raise DataError(
                f"{shards.shard_path(self.corpus, key)}: {int(bad.sum())} images have features that are NaN, Inf or beyond"
                f" float16 (65,504), the first is {ids[int(bad.argmax())]}. Check the encoder {self.encoder_dir}, or choose"
                " another encoder.layer."
            )


def _body(parents: dict[str, Artifact]) -> Any:
    def body(run: StageRun) -> dict[str, int]:
        from smalti.workflows.encoder import encoder_path

        recipe, corpus, encoder = run.recipe, parents["corpus"], encoder_path(parents["encoder"])
        model = open_encoder(encoder, recipe.encoder.layer)
        total = model.grid[0] * model.grid[1]
        if recipe.features.patches != "all" and recipe.features.patches > total:
            raise ConfigError(
                f"features.patches={recipe.features.patches}, but {encoder} gives {total} patches an image. "
                f"Set features.patches to at most {total}, or to all."
            )
        keys = shards.list_shards(corpus.path)
        refuse_foreign(run.path, keys)
        counts = {"images": 0, "vectors": 0, "train": 0, "val": 0, "dim": model.dim}
        args = (run.path, corpus.path, encoder, recipe, model.image_size)
        del model
        with ensure_ray(recipe), run.progress(corpus.counts["images"], "images") as bar:
            for receipt, num_images in run_shards(keys, FeatureShard, args, recipe.resources):
                bar.update(num_images)
                counts["images"] += num_images
                counts["vectors"] += receipt.rows
                counts[receipt.key.split("/")[0]] += receipt.rows
        return counts

    return body
