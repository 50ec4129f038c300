"""Train SemHiTok's semantic codebook on the frozen encoder's features.

See arXiv 2503.06764, stage S.

Axis letters: B images, N patches, C feature width, K codes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

import torch
from safetensors.torch import save
from torch import Tensor, nn

from smalti import storage
from smalti.schema import SemanticStage
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.quantizers import EMAStats
from smalti.tokenizers.semhitok import SemanticTokenizer
from smalti.workflows.train.task import Batch, Context, Metrics
from smalti.workflows.train.tasks.images import ImageSettings, ImageTask, chosen
from smalti.workflows.train.throughput import flops_a_token

if TYPE_CHECKING:
    from smalti.workflows.train.deepspeed_compat import Engine

WEIGHTS = "semantic.safetensors"


class SemanticTask(ImageTask):
    """VQ-KD: trains projection, quantizer and decoder.

    An EMA codebook follows the statistics of all workers.

    Args:
        stage: sizes and the quantizer.
        num_codes: K.
        grid: rows and columns of patches.
        dim: C.
        centroids: file of the codebook artifact with the first codes.
        images: see `ImageTask`.
    """

    def __init__(
        self,
        stage: SemanticStage,
        num_codes: int,
        grid: tuple[int, int],
        dim: int,
        centroids: str,
        **images: Unpack[ImageSettings],
    ) -> None:
        super().__init__(**images)
        self.stage = stage
        self.num_codes = num_codes
        self.grid = grid
        self.dim = dim
        self.centroids = centroids

    def build(self, context: Context, encoder: VisionEncoder | None, *, load: bool = True) -> None:
        super().build(context, encoder, load=load)
        self.tokenizer = SemanticTokenizer(self.dim, self.stage, self.num_codes, self.grid)
        if load:
            self.tokenizer.init_from(read_centroids(self.centroids))
        self.skipped(0)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.tokenizer}

    def flops_per_unit(self) -> float:
        """Per image: the encoder's forward, projection and decoder forward and backward."""
        assert self.encoder is not None
        frozen = flops_a_token(self.encoder, backward=False)
        return self.grid[0] * self.grid[1] * (frozen + flops_a_token(self.tokenizer))

    def loss(
        self,
        name: str,
        engines: Mapping[str, Engine],
        batch: Batch,
        step: int,
        share: Tensor | None,
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

    def after_step(self, step: int, engines: Mapping[str, Engine]) -> Metrics:
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
        """Write `semantic.safetensors`."""
        write_tensors(storage.join(path, WEIGHTS), weights["model"])
        return {}


def read_centroids(path: str) -> Tensor:
    """Read the centroids (K, C) of a codebook artifact."""
    return read_tensors(path)["centroids"]


def read_tensors(path: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or URL."""
    from safetensors.torch import load

    return load(storage.read_bytes(path))


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file or URL atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    storage.write_atomic(path, save(contiguous))
