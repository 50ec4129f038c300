"""Train DualToken: one tower, two residual codebooks and a pixel decoder (arXiv 2503.14324).

Axis letters: B images, N patches, C tower width, D code width, T vectors, H W pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from smalti import storage
from smalti.schema import DualStage, Loss
from smalti.tokenizers.dualtoken import BOOKS, DualModel
from smalti.tokenizers.encoders import VisionEncoder, open_encoder
from smalti.tokenizers.quantizers import EMAStats
from smalti.tokenizers.residual import SAMPLES_PER_CODE, ResidualQuantizer
from smalti.workflows.train.task import Batch, Context, Metrics, StepReader
from smalti.workflows.train.tasks.images import ImageSettings, chosen, picture_grid, to_unit
from smalti.workflows.train.tasks.reconstruction import ReconstructionModule, ReconstructionTask
from smalti.workflows.train.tasks.semantic import write_tensors
from smalti.workflows.train.throughput import flops_a_token

if TYPE_CHECKING:
    from smalti.workflows.train.deepspeed_compat import Engine

WEIGHTS = "dual.safetensors"
INIT_VECTORS = 1 << 22
"""Most vectors used to initialise a codebook."""


class DualModule(ReconstructionModule):
    """A DualModel for an engine.

    Attributes:
        codes: codes of the last forward.
        stats: its statistics for both codebooks.
        distance: its distance between trained and frozen features.
    """

    codes: Tensor | None = None
    stats: tuple[EMAStats | None, EMAStats | None] = (None, None)
    distance: Tensor | None = None

    def __init__(self, model: DualModel) -> None:
        super().__init__()
        self.model = model

    @property
    def last_layer(self) -> Tensor:
        return self.model.last_layer

    def forward(
        self, pixels: Tensor, target: Tensor | None, quantize: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct images.

        Args:
            pixels: images (B, 3, H, W) in [-1, 1].
            target: features of the frozen encoder (B, N, C); None: stop after the tower.
            quantize: whether to quantize the vectors.

        Returns:
            The reconstruction, the semantic loss and the commitment loss. Without a target: the
            vectors z_pix and z_sem, and 0.
        """
        if target is None:
            z_pixel, z_semantic = self.model.vectors(pixels)
            return z_pixel, z_semantic, z_pixel.new_zeros(())
        out = self.model(pixels, target, quantize)
        self.reconstructed = out.pixels
        self.codes = out.codes
        self.stats = out.stats
        self.distance = out.distance
        return out.pixels.view_as(out.pixels), out.semantic, out.commitment


class DualTask(ReconstructionTask):
    """DualToken's one phase.

    There are two copies of the encoder: a frozen one, whose features are F0, and the trained one.

    Args:
        stage: sizes and weights.
        loss: weights of the pixel losses.
        images: see `ImageTask`.
    """

    def __init__(self, stage: DualStage, loss: Loss, **images: Unpack[ImageSettings]) -> None:
        super().__init__(loss, **images)
        self.stage = stage

    def build(self, context: Context, encoder: VisionEncoder | None, *, load: bool = True) -> None:
        super().build(context, encoder, load=load)
        if load:
            assert self.encoder_path is not None
            trained = open_encoder(self.encoder_path, self.layer)
        else:
            assert encoder is not None
            trained = copy.deepcopy(encoder)
        self.model = DualModel(self.stage, trained)
        self.setup_losses(context, load=load)
        self.skipped(0)

    def main_module(self) -> DualModule:
        return DualModule(self.model)

    @property
    def books(self) -> dict[str, ResidualQuantizer]:
        """The quantizers, in the order of `BOOKS`."""
        return {"pixel": self.model.pixel, "semantic": self.model.semantic}

    def flops_per_unit(self) -> float:
        """Per image: the frozen tower's forward, tower and decoder forward and backward."""
        blocks = nn.ModuleList(self.model.encoder.tower.encoder.layers[: self.model.depth])
        decoder = self.model.decoder
        once = flops_a_token(blocks, backward=False)
        return math.prod(self.model.grid) * (once + flops_a_token(blocks) + flops_a_token(decoder))

    def begin_step(self, step: int, engines: Mapping[str, Engine], read: StepReader) -> None:
        """At `init_steps`, initialise the codebooks by k-means, the same on all ranks.

        The vectors are those of the next batches.
        """
        if step != self.stage.init_steps:
            return
        collectives = self.context.collectives
        codes_per_depth = math.ceil(self.stage.codes / self.stage.depth)
        wanted = min(SAMPLES_PER_CODE * codes_per_depth, INIT_VECTORS)
        images = math.ceil(wanted / math.prod(self.model.grid))
        steps = math.ceil(min(images, sum(self.sizes)) / self.context.train.batch_size)
        seen: dict[str, list[Tensor]] = {name: [] for name in BOOKS}
        engines["model"].eval()
        with torch.no_grad():
            for ahead in range(step, step + steps):
                # gathered step by step: the order of one worker's batches
                own = self._vectors(engines["model"], read(ahead))
                for name, z_TD in own.items():
                    seen[name].append(collectives.all_gather(z_TD))
        generator = self.context.generator(step)
        for name, quantizer in self.books.items():
            codes = quantizer.codes.cpu()
            if collectives.rank == 0:
                codes = quantizer.start_of(torch.cat(seen[name]).cpu(), generator)
            quantizer.book.set_codes(collectives.broadcast(codes.to(self.context.device)))

    def _vectors(self, engine: Engine, batches: list[Batch]) -> dict[str, Tensor]:
        """Vectors of batches for each codebook, (T, D), in the order of `BOOKS`."""
        pixel: list[Tensor] = []
        semantic: list[Tensor] = []
        for batch in batches:
            z_pixel, z_semantic, _ = engine(to_unit(batch["pixels"]), None)
            pixel.append(z_pixel.float().flatten(0, 1))
            semantic.append(z_semantic.float().flatten(0, 1))
        return {"pixel": torch.cat(pixel), "semantic": torch.cat(semantic)}

    def loss(
        self,
        name: str,
        engines: Mapping[str, Engine],
        batch: Batch,
        step: int,
        share: Tensor | None,
    ) -> tuple[Tensor, Metrics] | None:
        if name == "discriminator":
            return self.discriminator_loss(engines, batch, step)
        pixels = batch["pixels"]
        target = to_unit(pixels)
        features = self.memory.get(
            batch["places"], lambda missing: self.features(chosen(pixels, missing))
        )
        reconstructed, semantic, commitment = engines[name](
            target, features, step >= self.stage.init_steps
        )
        module = engines[name].module
        assert isinstance(module, DualModule) and module.distance is not None
        loss, metrics = self.image_loss(engines, reconstructed, target, step)
        loss = loss + semantic + commitment
        metrics |= {
            "semantic": module.distance,
            "commitment": commitment.detach(),
            "loss": loss.detach(),
        }
        pixel, meaning = module.stats
        if module.codes is not None and pixel is not None and meaning is not None:
            self.stats.append((pixel, meaning))
            for used, ids in zip(self.used, module.codes.unbind(2), strict=True):
                used[ids.flatten()] = 1.0
        return loss, metrics

    def after_step(self, step: int, engines: Mapping[str, Engine]) -> Metrics:
        """Update both codebooks.

        Returns:
            The shares of codes that the step used, over all workers, and the number of restarted
            codes.
        """
        if not self.stats:
            return {}
        collectives = self.context.collectives
        generator = self.context.generator(step)
        shares = (collectives.all_reduce(self.used) > 0).double().mean(1)
        metrics: dict[str, Tensor | float] = {
            "codes_used": shares[0],
            "semantic_codes_used": shares[1],
        }
        restarted = 0.0
        for number, quantizer in enumerate(self.books.values()):
            stats = EMAStats.merge([of_batch[number] for of_batch in self.stats])
            restarted += float(
                quantizer.update(stats, collectives.all_reduce, generator, collectives.rank)
            )
        metrics["restarted"] = restarted
        self.skipped(step)
        return metrics

    def skipped(self, step: int) -> None:
        self.stats: list[tuple[EMAStats, EMAStats]] = []
        self.used = torch.zeros(len(BOOKS), self.stage.codes, device=self.context.device)

    def pictures(self, engines: Mapping[str, Engine]) -> dict[str, np.ndarray]:
        """Held-out images: input | reconstruction from pixel codes."""
        pixels = self.held_out()
        if not len(pixels):
            return {}
        reconstructed, *_ = engines["model"](to_unit(pixels), self.features(pixels), True)
        return {"reconstruction": picture_grid([to_unit(pixels), reconstructed])}

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """Write `dual.safetensors`: the DualModel's state."""
        state = {name.removeprefix("model."): tensor for name, tensor in weights["model"].items()}
        write_tensors(storage.join(path, WEIGHTS), state)
        return {}
