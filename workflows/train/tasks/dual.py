"""Training DualToken: one tower, two residual codebooks and a pixel decoder at once (arXiv
2503.14324).

Axis letters: B images, N patches, C tower width, D code width, T vectors, H W pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

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
from smalti.workflows.train.tasks.images import chosen, picture_grid, to_unit
from smalti.workflows.train.tasks.reconstruction import RebuildModule, RebuildTask
from smalti.workflows.train.tasks.semantic import write_tensors
from smalti.workflows.train.throughput import flops_a_token

WEIGHTS = "dual.safetensors"
INIT_VECTORS = 1 << 22
"""Vectors looked at, at most, when a codebook starts."""


class DualModule(RebuildModule):
    """A DualModel in an engine. `codes`, `stats`, `distance`: of the last forward."""

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
        """(rebuilt, semantic loss, commitment); without a target the vectors (z_pix, z_sem) and
        nothing.
        """
        if target is None:
            z_pixel, z_semantic = self.model.vectors(pixels)
            return z_pixel, z_semantic, z_pixel.new_zeros(())
        out = self.model(pixels, target, quantize)
        self.made, self.codes, self.stats, self.distance = (
            out.pixels,
            out.codes,
            out.stats,
            out.distance,
        )
        return out.pixels.view_as(out.pixels), out.semantic, out.commitment


class DualTask(RebuildTask):
    """DualToken's one phase.

    The encoder stands twice: as it was, frozen (its features are F0), and trained.
    """

    def __init__(self, stage: DualStage, loss: Loss, **images_of: Any) -> None:
        super().__init__(loss, **images_of)
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
        """Of an image: the tower forward as it was, the trained one and the decoder both ways."""
        blocks = nn.ModuleList(self.model.encoder.tower.encoder.layers[: self.model.depth])
        decoder = self.model.decoder
        once = flops_a_token(blocks, backward=False)
        return math.prod(self.model.grid) * (once + flops_a_token(blocks) + flops_a_token(decoder))

    def begin_step(self, step: int, engines: Mapping[str, Any], read: StepReader) -> None:
        """At `init_steps`, start the codebooks as k-means of the vectors of the coming batches,
        alike on all ranks.
        """
        if step != self.stage.init_steps:
            return
        collectives, train = self.context.collectives, self.context.train
        wanted = min(
            SAMPLES_PER_CODE * math.ceil(self.stage.codes / self.stage.depth), INIT_VECTORS
        )
        images = math.ceil(wanted / math.prod(self.model.grid))
        steps = math.ceil(min(images, sum(self.sizes)) / train.batch_size)
        seen: dict[str, list[Tensor]] = {name: [] for name in BOOKS}
        engines["model"].eval()
        with torch.no_grad():
            for ahead in range(
                step, step + steps
            ):  # gathered step by step: the order of one worker's batches
                parts = [
                    engines["model"](to_unit(batch["pixels"]), None)[:2] for batch in read(ahead)
                ]
                for name, own in zip(BOOKS, zip(*parts, strict=True), strict=True):
                    seen[name].append(
                        collectives.all_gather(torch.cat([z.float().flatten(0, 1) for z in own]))
                    )
        generator = self.context.generator(step)
        for name, quantizer in self.books.items():
            codes = quantizer.codes.cpu()
            if collectives.rank == 0:
                codes = quantizer.start_of(torch.cat(seen[name]).cpu(), generator)
            quantizer.book.set_codes(collectives.broadcast(codes.to(self.context.device)))

    def loss(
        self, name: str, engines: Mapping[str, Any], batch: Batch, step: int, share: Tensor | None
    ) -> tuple[Tensor, Metrics] | None:
        if name == "discriminator":
            return self.discriminator_loss(engines, batch, step)
        pixels, target = batch["pixels"], to_unit(batch["pixels"])
        features = self.memory.get(
            batch["places"], lambda missing: self.features(chosen(pixels, missing))
        )
        rebuilt, semantic, commitment = engines[name](
            target, features, step >= self.stage.init_steps
        )
        module: DualModule = engines[name].module
        loss, metrics = self.image_loss(engines, rebuilt, target, step)
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

    def after_step(self, step: int, engines: Mapping[str, Any]) -> Metrics:
        """Moves both codebooks; the share of codes that the step used, over all workers, and how
        many restarted.
        """
        if not self.stats:
            return {}
        collectives, generator = self.context.collectives, self.context.generator(step)
        shares = (collectives.all_reduce(self.used) > 0).double().mean(1)
        metrics: dict[str, Tensor | float] = {
            "codes_used": shares[0],
            "semantic_codes_used": shares[1],
        }
        metrics["restarted"] = 0.0
        for quantizer, parts in zip(
            self.books.values(), zip(*self.stats, strict=True), strict=True
        ):
            stats = EMAStats.merge(parts)
            metrics["restarted"] += float(
                quantizer.update(stats, collectives.all_reduce, generator, collectives.rank)
            )
        self.skipped(step)
        return metrics

    def skipped(self, step: int) -> None:
        self.stats: list[tuple[EMAStats, EMAStats]] = []
        self.used = torch.zeros(len(BOOKS), self.stage.codes, device=self.context.device)

    def pictures(self, engines: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Held-out images: input | rebuilt from pixel codes."""
        pixels = self.held_out()
        if not len(pixels):
            return {}
        rebuilt, *_ = engines["model"](to_unit(pixels), self.features(pixels), True)
        return {"reconstruction": picture_grid([to_unit(pixels), rebuilt])}

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """`dual.safetensors`: the DualModel's state."""
        state = {name.removeprefix("model."): tensor for name, tensor in weights["model"].items()}
        write_tensors(storage.join(path, WEIGHTS), state)
        return {}
