"""Train SemHiTok's pixel codebooks and decoder (arXiv 2503.06764, stages P and D).

Axis letters: B images, N patches, D pixel code width, T vectors, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from smalti import storage
from smalti.schema import Loss, PixelStage, SemanticStage, VitSize
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.quantizers import presence
from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer
from smalti.tokenizers.subcodes import SAMPLES_PER_ROW
from smalti.workflows.train.engines import set_parameter
from smalti.workflows.train.task import Batch, Context, Metrics, StepReader
from smalti.workflows.train.tasks.images import ImageSettings, chosen, picture_grid, to_unit
from smalti.workflows.train.tasks.reconstruction import ReconstructionModule, ReconstructionTask
from smalti.workflows.train.tasks.semantic import read_tensors, write_tensors

if TYPE_CHECKING:
    from smalti.workflows.train.deepspeed_compat import Engine

WEIGHTS = "pixel.safetensors"
INIT_VECTORS = 1 << 22
"""Most vectors used to initialise the pixel codebooks."""


class PixelModule(ReconstructionModule):
    """A PixelTokenizer for an engine."""

    def __init__(self, tokenizer: PixelTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def last_layer(self) -> Tensor:
        return self.tokenizer.last_layer

    def forward(
        self,
        pixels: Tensor,
        semantic_ids: Tensor | None,
        quantize: bool = True,
        vectors_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Reconstruct images.

        Args:
            pixels: images (B, 3, H, W) in [-1, 1].
            semantic_ids: semantic codes (B, N); None without guidance.
            quantize: whether to quantize the vectors.
            vectors_only: stop after the encoder.

        Returns:
            The reconstruction, the VQ loss, the codes, and the reconstruction from semantic codes
            alone. With `vectors_only`: the encoder's vectors (B, N, D), 0, None and None.
        """
        if vectors_only:
            p_BND = self.tokenizer.encode_vectors(pixels)
            return p_BND, p_BND.new_zeros(()), None, None
        out = self.tokenizer(pixels, semantic_ids, quantize)
        self.reconstructed = out.pixels
        return out.pixels.view_as(out.pixels), out.vq_loss, out.codes, out.semantic_only


class PixelTask(ReconstructionTask):
    """Trains pixel encoder, codebooks and decoder, or a new decoder only.

    Args:
        stage: sizes and weights.
        loss: weights of the pixel losses.
        grid: rows and columns of patches.
        num_codes: number of pixel codes.
        semantic: settings, number of codes, width and weights of the semantic phase; None without
            guidance.
        decoder: size of a new decoder, which alone is trained then; None: train all.
        start: weights of the pixel phase, for `decoder`.
        images: see `ImageTask`.
    """

    used: Tensor

    def __init__(
        self,
        stage: PixelStage,
        loss: Loss,
        grid: tuple[int, int],
        num_codes: int,
        semantic: tuple[SemanticStage, int, int, str] | None = None,
        decoder: VitSize | None = None,
        start: str | None = None,
        **images: Unpack[ImageSettings],
    ) -> None:
        super().__init__(loss, **images)
        self.stage = stage
        self.grid = grid
        self.num_codes = num_codes
        self.semantic_settings = semantic
        self.decoder_size = decoder
        self.start = start

    def build(self, context: Context, encoder: VisionEncoder | None, *, load: bool = True) -> None:
        super().build(context, encoder, load=load)
        self.semantic: SemanticTokenizer | None = None
        if self.semantic_settings is not None:
            stage, num_semantic, dim, path = self.semantic_settings
            self.semantic = SemanticTokenizer(dim, stage, num_semantic, self.grid)
            if load:
                self.semantic.load_state_dict(read_tensors(path))
                self.semantic.to(context.device)
            self.semantic.eval().requires_grad_(False)
        codes = None if self.semantic is None else self.semantic.codes
        self.tokenizer = PixelTokenizer(
            self.stage, codes, self.image_size, self.grid, self.num_codes
        )
        if self.decoder_size is not None:
            if load:
                assert self.start is not None
                self.tokenizer.load_state_dict(read_tensors(self.start))
            self.tokenizer.replace_decoder(self.decoder_size)
        self.setup_losses(context, load=load)
        self.skipped(0)

    def frozen_modules(self) -> dict[str, nn.Module]:
        frozen = super().frozen_modules()
        return frozen if self.semantic is None else frozen | {"semantic": self.semantic}

    def main_module(self) -> PixelModule:
        return PixelModule(self.tokenizer)

    def semantic_ids(self, batch: Batch) -> Tensor | None:
        """Semantic codes of a batch: int64 (B, N); computed once per row."""
        semantic = self.semantic
        if semantic is None:
            return None

        def compute(missing: list[int]) -> Tensor:
            return semantic.encode(self.features(chosen(batch["pixels"], missing))).int()

        return self.memory.get(batch["places"], compute).long()

    @property
    def quantize_from(self) -> int:
        """Step from which vectors are quantized; 0 in the decoder phase."""
        return 0 if self.decoder_size is not None else self.stage.init_steps

    def begin_step(self, step: int, engines: Mapping[str, Engine], read: StepReader) -> None:
        """At `init_steps`, initialise the codebooks by k-means, the same on all ranks.

        The vectors are those of the next batches.
        """
        if step != self.quantize_from or self.decoder_size is not None:
            return
        collectives = self.context.collectives
        train = self.context.train
        patches = self.grid[0] * self.grid[1]
        wanted = min(self.num_codes * SAMPLES_PER_ROW, INIT_VECTORS)
        steps = min(
            math.ceil(wanted / (train.batch_size * patches)),
            math.ceil(sum(self.sizes) / train.batch_size),
        )
        vectors = []
        ids = []
        engines["model"].eval()
        with torch.no_grad():
            for ahead in range(step, step + steps):
                # gathered step by step: the order of one worker's batches
                found = [self._vectors(engines["model"], batch) for batch in read(ahead)]
                vectors.append(collectives.all_gather(torch.cat([p_TD for p_TD, _ in found])))
                ids.append(collectives.all_gather(torch.cat([ids_T for _, ids_T in found])))
        vectors_TD = torch.cat(vectors)
        ids_T = torch.cat(ids)
        codebook = self.tokenizer.codebook
        initial = type(codebook)(*self._codebook_sizes())
        if collectives.rank == 0:
            initial.init_from(vectors_TD.cpu(), ids_T.cpu(), self.context.generator(step))
        codes = collectives.broadcast(initial.codes.detach().to(self.context.device))
        set_parameter(engines["model"], codebook.codes, codes)

    def _vectors(self, engine: Engine, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pixel encoder's vectors of a batch (T, D), and their semantic codes (T,).

        The codes are zeros without guidance.
        """
        semantic_ids = self.semantic_ids(batch)
        p_BND, *_ = engine(to_unit(batch["pixels"]), semantic_ids, vectors_only=True)
        p_TD = p_BND.float().flatten(0, 1)
        if semantic_ids is None:
            return p_TD, p_TD.new_zeros(len(p_TD), dtype=torch.int64)
        return p_TD, semantic_ids.flatten()

    def _codebook_sizes(self) -> tuple[int, ...]:
        if self.semantic is None:
            return (self.num_codes, self.stage.dim)
        return (self.semantic.num_codes, self.stage.codes, self.stage.dim)

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
        target = to_unit(batch["pixels"])
        quantize = step >= self.quantize_from
        reconstructed, vq, codes, semantic_only = engines[name](
            target, self.semantic_ids(batch), quantize
        )
        loss, metrics = self.image_loss(engines, reconstructed, target, step)
        if self.decoder_size is None:
            loss = loss + self.stage.vq_weight * vq
            metrics["vq"] = vq.detach()
            if codes is not None:
                present = presence(codes, self.num_codes)
                metrics["codes_in_batch"] = present.sum()
                self.used = torch.maximum(self.used, present)
            if semantic_only is not None:
                other, parts = self.criterion(semantic_only, target)
                loss = loss + other
                metrics["psnr_semantic_only"] = -10 * torch.log10(parts["l2"] / 4)
        return loss, metrics | {"loss": loss.detach()}

    def after_step(self, step: int, engines: Mapping[str, Engine]) -> Metrics:
        """Share of all codes that the batch of a logged step uses, over all workers."""
        used = self.used
        self.skipped(step)
        quantizing = step >= self.quantize_from and self.decoder_size is None
        if not quantizing or (step + 1) % self.context.train.log_every:
            return {}
        return {"codes_used": (self.context.collectives.all_reduce(used) > 0).double().mean()}

    def skipped(self, step: int) -> None:
        self.used = torch.zeros(self.num_codes, device=self.context.device)

    def pictures(self, engines: Mapping[str, Engine]) -> dict[str, np.ndarray]:
        """Held-out images: input | reconstruction (| from semantic codes alone)."""
        pixels = self.held_out()
        if not len(pixels):
            return {}
        ids = None if self.semantic is None else self.semantic.encode(self.features(pixels))
        reconstructed, _, _, semantic_only = engines["model"](to_unit(pixels), ids, True)
        columns = [to_unit(pixels), reconstructed]
        if semantic_only is not None:
            columns.append(semantic_only)
        return {"reconstruction": picture_grid(columns)}

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """Write `pixel.safetensors`: the PixelTokenizer's state."""
        state = {
            name.removeprefix("tokenizer."): tensor for name, tensor in weights["model"].items()
        }
        write_tensors(storage.join(path, WEIGHTS), state)
        return {}
