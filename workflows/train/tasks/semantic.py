"""Training SemHiTok's semantic codebook on the features of the frozen encoder (arXiv 2503.06764,
stage S).

Axis letters: B images, N patches, C feature width, K codes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from smalti import storage
from smalti.schema import SemanticStage, Train
from smalti.tokenizers.encoders import VisionEncoder, open_encoder
from smalti.tokenizers.quantizers import EMAStats
from smalti.tokenizers.semhitok import SemanticTokenizer
from smalti.workflows.train.data import ImageRows
from smalti.workflows.train.task import Batch, Context, Metrics, Row, Source, Task
from smalti.workflows.train.tasks.images import RowMemory, chosen, places_of, stack_pixels, to_unit
from smalti.workflows.train.throughput import flops_a_token

WEIGHTS = "semantic.safetensors"


def encodes_in_bf16(precision: str, train: Train, gpu: bool) -> bool:
    """Whether the frozen encoder computes in bf16 beside a model that trains so
    (`tokenizer.encoder_precision`).
    """
    return precision == "bf16" or (precision == "auto" and gpu and train.precision == "bf16")


class ImageTask(Task):
    """Base of the tasks over corpus images with a frozen encoder."""

    def __init__(
        self,
        corpus: str,
        keys: list[str],
        sizes: list[int],
        image_size: int,
        max_pixels: int,
        encoder: str | None,
        layer: int,
        encoder_precision: str = "auto",
    ) -> None:
        self.corpus, self.keys, self.sizes = corpus, keys, sizes
        self.image_size, self.max_pixels = image_size, max_pixels
        self.encoder_path, self.layer, self.encoder_precision = encoder, layer, encoder_precision

    def source(self) -> Source:
        return ImageRows(
            self.corpus, self.keys, self.sizes, self.image_size, max_pixels=self.max_pixels, text=()
        )

    def setup(self, context: Context) -> None:
        encoder: VisionEncoder | None = None
        if self.encoder_path is not None:
            encoder = open_encoder(self.encoder_path, self.layer).to(context.device)
            encoder.bf16 = encodes_in_bf16(
                self.encoder_precision, context.train, context.device.type == "cuda"
            )
        self.build(context, encoder)

    def build(self, context: Context, encoder: VisionEncoder | None, *, load: bool = True) -> None:
        """Build all modules around the frozen encoder.

        Args:
            load: False leaves out all files of weights, as for a plan on the meta device.
        """
        super().setup(context)
        self.memory = RowMemory(sum(self.sizes))
        self.encoder = encoder

    def frozen_modules(self) -> dict[str, nn.Module]:
        return {} if self.encoder is None else {"encoder": self.encoder}

    def make_batch(self, rows: Sequence[Row]) -> Batch:
        """pixels uint8 (B, 3, H, W), and where the rows lie."""
        return {"pixels": stack_pixels(rows), "places": places_of(rows)}

    def planned_batch(self, num: int) -> Batch:
        shape = (num, 3, self.image_size, self.image_size)
        return {
            "pixels": torch.randint(256, shape, dtype=torch.uint8),
            "places": [("planned", row) for row in range(num)],
        }

    def features(self, pixels: Tensor) -> Tensor:
        """Patch features of uint8 pixels: float32 (B, N, C), no gradient."""
        assert self.encoder is not None
        with torch.no_grad():
            return self.encoder(to_unit(pixels))


class SemanticTask(ImageTask):
    """VQ-KD: projection, quantizer and decoder train; an EMA codebook follows the statistics of all
    workers.
    """

    def __init__(
        self,
        stage: SemanticStage,
        num_codes: int,
        grid: tuple[int, int],
        dim: int,
        centroids: str,
        **images: Any,
    ) -> None:
        super().__init__(**images)
        self.stage, self.num_codes, self.grid, self.dim, self.centroids = (
            stage,
            num_codes,
            grid,
            dim,
            centroids,
        )

    def build(self, context: Context, encoder: VisionEncoder | None, *, load: bool = True) -> None:
        super().build(context, encoder, load=load)
        self.tokenizer = SemanticTokenizer(self.dim, self.stage, self.num_codes, self.grid)
        if load:
            self.tokenizer.init_from(read_centroids(self.centroids))
        self.skipped(0)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.tokenizer}

    def flops_per_unit(self) -> float:
        """Of an image: the frozen encoder forward, projection and decoder both ways."""
        assert self.encoder is not None
        return (self.grid[0] * self.grid[1]) * (
            flops_a_token(self.encoder, backward=False) + flops_a_token(self.tokenizer)
        )

    def loss(
        self, name: str, engines: Mapping[str, Any], batch: Batch, step: int, share: Tensor | None
    ) -> tuple[Tensor, Metrics] | None:
        pixels = batch["pixels"]
        features = self.memory.get(
            batch["places"], lambda missing: self.features(chosen(pixels, missing))
        )
        loss, metrics, stats = engines[name](features)
        assert self.tokenizer.ids is not None
        self.used[self.tokenizer.ids.flatten()] = 1.0
        if stats is not None:
            self.stats.append(stats)
        return loss, metrics

    def after_step(self, step: int, engines: Mapping[str, Any]) -> Metrics:
        collectives = self.context.collectives
        metrics: dict[str, Tensor | float] = {
            "codes_used": (collectives.all_reduce(self.used) > 0).double().mean()
        }
        if self.stats:
            generator = self.context.generator(step)
            stats = EMAStats.merge(self.stats)
            restarted = self.tokenizer.after_step(
                stats, collectives.all_reduce, generator, collectives.rank
            )
            metrics["restarted"] = float(restarted)
        self.skipped(step)
        return metrics

    def skipped(self, step: int) -> None:
        self.stats: list[EMAStats] = []
        self.used = torch.zeros(self.num_codes, device=self.context.device)

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """`semantic.safetensors`."""
        write_tensors(storage.join(path, WEIGHTS), weights["model"])
        return {}


def read_centroids(path: str) -> Tensor:
    """The centroids (K, C) of a codebook artifact's file."""
    tensors = read_tensors(path)
    return tensors["centroids"]


def read_tensors(path: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, anywhere."""
    from safetensors.torch import load

    return load(storage.read_bytes(path))


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all, anywhere."""
    storage.write_atomic(
        path, save({name: tensor.contiguous() for name, tensor in tensors.items()})
    )
