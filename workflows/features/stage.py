"""Stage `features`: corpus shards → shards of patch features of the frozen encoder, all or a seeded sample an image."""

from __future__ import annotations

import hashlib
import socket
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from smalti import images, shards, storage
from smalti.artifact import Artifact
from smalti.errors import ArtifactError, ConfigError, DataError, ImageError
from smalti.schema import FeaturesSection, Recipe, Resources, TokensSection
from smalti.tracking import Tracker
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.pipeline.shards import refuse_foreign, run_shards, standing_for
from smalti.workflows.pipeline.stage import StageRun, find_artifact, run_stage
from smalti.workflows.pipeline.timings import HERE, shard_progress


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The features artifact: a shard of patch vectors (float16) for each corpus shard, train and val; with
    `features.source` shards made straight from that source (`feature_source`), and no corpus is needed.

    Counts: images, vectors, train, val (vectors of each split), dim. Errors: DataError on a NaN or Inf feature.
    """
    config: dict[str, Any] = {"patches": recipe.features.patches, "layer": recipe.encoder.layer}
    if recipe.features.patches != "all":
        config["seed"] = recipe.seed
    config |= numerics(recipe.features)
    parents = {"encoder": find_artifact(recipe, "encoder")}
    if recipe.features.source:
        from smalti.workflows.features import from_source

        config |= from_source.source_config(recipe)
        body = partial(from_source.make, encoder=parents["encoder"])
    else:
        parents = {"corpus": find_artifact(recipe, "corpus"), **parents}
        body = _body(parents)
    return run_stage(recipe, "features", "features", config, parents, body, tracker=tracker)


def choose_patches(identity: str, seed: int, num: int, total: int) -> np.ndarray:
    """`num` of `total` patches of an image, sorted, int32: drawn by a hash of seed and image_id, so always the same."""
    digest = hashlib.sha256(f"{seed}/{identity}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return np.sort(rng.permutation(total)[:num]).astype(np.int32)


def load_pixels(corpus: str, key: str, size: int, max_pixels: int, columns: list[str]) -> tuple[pa.Table, np.ndarray]:
    """Some columns of a corpus shard and its images as uint8 (rows, size, size, 3). Errors: DataError, an image that
    cannot be decoded any more."""
    with HERE.part("read"):
        table = shards.read_shard(corpus, key, [*columns, "image"])
    pixels = np.empty((table.num_rows, size, size, 3), np.uint8)
    with HERE.part("decode"):
        for row, data in enumerate(table.column("image")):
            try:
                pixels[row] = images.to_pixels(data.as_py(), size, max_pixels=max_pixels)
            except ImageError as error:
                identity = table.column("image_id")[row].as_py()
                raise DataError(
                    f"{shards.shard_path(corpus, key)}: image {identity}: {error}. Make the corpus again."
                ) from error
    return table.drop_columns(["image"]), pixels


def block_bytes(recipe: Recipe, image_size: int) -> int:
    """What the pixels of a full shard weigh."""
    return recipe.corpus.shard_images * image_size**2 * 3


def actor_device(resources: Resources) -> Any:
    """The actor's device; on a CPU torch gets the actor's share of the cores. Errors: ConfigError when a GPU is asked for
    and torch sees none."""
    import torch

    if resources.gpus_per_worker and resources.device == "auto":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"resources.gpus_per_worker={resources.gpus_per_worker:g}, but torch {torch.__version__} sees no GPU on "
                f"{socket.gethostname()}. Install a torch with CUDA and a driver there, set resources.gpus_per_worker=0, or "
                "resources.device=cpu to try the layout without GPUs."
            )
        return torch.device("cuda")
    torch.set_num_threads(resources.cpus_per_worker)
    return torch.device("cpu")


def numerics(section: FeaturesSection | TokensSection) -> dict[str, Any]:
    """Settings that change the last bits of a stage's result, those that are not the defaults."""
    return section.model_dump(mode="json", include={"precision", "compile"}, exclude_defaults=True)


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
        self.featurizer: Featurizer | None = None

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
        ids = table.column("image_id").to_pylist()
        if self.featurizer is None:
            self.featurizer = Featurizer(self.encoder_dir, self.recipe)
        rows = self.featurizer.rows(pixels, ids, shards.shard_path(self.corpus, key))
        with HERE.part("write"):
            return shards.write_shard(self.out, key, rows), len(ids)


class Featurizer:
    """The encoder of a recipe on the actor's device, and what of its features is kept."""

    def __init__(self, encoder_dir: str, recipe: Recipe) -> None:
        from smalti.tokenizers.encoders import as_set

        self.encoder_dir, self.recipe = encoder_dir, recipe
        self.device = actor_device(recipe.resources)
        with HERE.part("start"):
            encoder = open_encoder(encoder_dir, recipe.encoder.layer).to(self.device)
        self.dim: int = encoder.dim
        self.encode = as_set(encoder, self.device, recipe.features.precision, recipe.features.compile)

    def rows(self, pixels: np.ndarray, ids: list[str], where: str) -> pa.Table:
        """Feature rows of images uint8 (B, S, S, 3), all patches or the sampled ones; one batch's features are held.

        Errors: DataError naming the first image with a feature that is not finite in float16; `where` names the file.
        """
        import torch

        from smalti.tokenizers.encoders import batches, on_host

        size, parts, chosen = self.recipe.features.batch_size, [], []
        with HERE.part("model"), torch.inference_mode():
            results = on_host(self.encode(part).half() for part in batches(pixels, size, self.device))
            for start, result in zip(range(0, len(ids), size), results, strict=True):
                names, vectors_BNC = ids[start : start + size], result.numpy()
                self.check(vectors_BNC, names, where)
                chosen_BM = self.choose(names, vectors_BNC.shape[1])
                parts.append(np.take_along_axis(vectors_BNC, chosen_BM[:, :, None], axis=1))
                chosen.append(chosen_BM)
        patches_BM = np.concatenate(chosen) if chosen else np.empty((0, 0), np.int32)
        vectors = np.concatenate(parts).reshape(-1, self.dim) if parts else np.empty((0, self.dim), np.float16)
        arrays = [
            pa.array(np.repeat(np.array(ids, object), patches_BM.shape[1]), pa.string()),
            pa.array(patches_BM.reshape(-1), pa.int32()),
            shards.list_column(vectors),
        ]
        return pa.table(arrays, shards.feature_schema(self.dim))

    def choose(self, ids: list[str], total: int) -> np.ndarray:
        """Patches that are kept of each image: int32 (B, M), sorted."""
        wanted = self.recipe.features.patches
        if wanted == "all" or wanted >= total:
            return np.tile(np.arange(total, dtype=np.int32), (len(ids), 1))
        return np.stack([choose_patches(one, self.recipe.seed, wanted, total) for one in ids])

    def check(self, vectors_BNC: np.ndarray, ids: list[str], where: str) -> None:
        """Errors: DataError naming the first image with a feature that is not finite in float16."""
        bad = ~np.isfinite(vectors_BNC).all(axis=(1, 2))
        if bad.any():
            raise DataError(
                f"{where}: image {ids[int(bad.argmax())]} has features that are NaN, Inf or beyond float16 (65,504), as "
                f"{int(bad.sum())} of the {len(ids)} images of its batch. Check the encoder {self.encoder_dir}, or choose "
                "another encoder.layer."
            )


def _body(parents: dict[str, Artifact]) -> Any:
    def body(run: StageRun) -> dict[str, int]:
        recipe, corpus = run.recipe, parents["corpus"]
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


def open_parent(recipe: Recipe, encoder: Artifact) -> tuple[str, Any]:
    """The encoder's place and the encoder. Errors: ConfigError when the recipe asks for more patches than it gives."""
    from smalti.workflows.encoder import encoder_path

    path = encoder_path(encoder)
    model = open_encoder(path, recipe.encoder.layer)
    total = model.grid[0] * model.grid[1]
    if recipe.features.patches != "all" and recipe.features.patches > total:
        raise ConfigError(
            f"features.patches={recipe.features.patches}, but {path} gives {total} patches an image. "
            f"Set features.patches to at most {total}, or to all."
        )
    return path, model
