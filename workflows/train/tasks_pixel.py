"""Training SemHiTok's pixel codebooks and decoder (arXiv 2503.06764, stages P and D).

Axis letters: B images, N patches, D pixel code width, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smalti import images, shards, storage
from smalti.errors import ConfigError
from smalti.schema import Loss, PixelStage, SemanticStage, VitSize
from smalti.tokenizers.losses import PixelLoss, build_perceptual, discriminator_loss, gan_active
from smalti.tokenizers.patchgan import PatchGAN
from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer
from smalti.tokenizers.subcodes import SAMPLES_PER_ROW
from smalti.workflows.train.engines import set_parameter
from smalti.workflows.train.pixels import picture_grid, stack_pixels, to_unit
from smalti.workflows.train.task import Batch, Context, Metrics, Row, StepReader
from smalti.workflows.train.tasks_semantic import ImageTask, read_tensors, write_tensors

WEIGHTS = "pixel.safetensors"
PICTURES = 8
INIT_VECTORS = 1 << 22
"""Vectors looked at, at most, when the pixel codebooks start."""


class PixelModule(nn.Module):
    """A PixelTokenizer whose outputs are a plain tuple, as DeepSpeed's hooks want them. `made`: the rebuilt images of
    the last forward before those hooks, through which a gradient can be taken beside the engine's backward."""

    made: Tensor | None = None

    def __init__(self, tokenizer: PixelTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(
        self, pixels: Tensor, semantic_ids: Tensor | None, quantize: bool = True, vectors_only: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(rebuilt, vq loss, codes, semantic-only rebuilt); `vectors_only`: the encoder's vectors in the first place."""
        if vectors_only:
            p_BND = self.tokenizer.encode_vectors(pixels)
            return p_BND, p_BND.new_zeros(()), None, None
        out = self.tokenizer(pixels, semantic_ids, quantize)
        self.made = out.pixels
        return out.pixels.view_as(out.pixels), out.vq_loss, out.codes, out.semantic_only


class PixelTask(ImageTask):
    """Pixel encoder, codebooks and decoder; `decoder`: only a new decoder of that size, on the codes as they are.

    semantic: weights of the semantic phase, None without guidance. start: weights of the pixel phase (for `decoder`).
    """

    def __init__(
        self,
        stage: PixelStage,
        loss: Loss,
        grid: tuple[int, int],
        num_codes: int,
        semantic: tuple[SemanticStage, int, int, str] | None = None,
        decoder: VitSize | None = None,
        start: str | None = None,
        **images_of: Any,
    ) -> None:
        super().__init__(**images_of)
        self.stage, self.loss_config, self.grid, self.num_codes = stage, loss, grid, num_codes
        self.semantic_settings, self.decoder_size, self.start = semantic, decoder, start

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.semantic: SemanticTokenizer | None = None
        if self.semantic_settings is not None:
            stage, num_semantic, dim, path = self.semantic_settings
            self.semantic = SemanticTokenizer(dim, stage, num_semantic, self.grid)
            self.semantic.load_state_dict(read_tensors(path))
            self.semantic.to(context.device).eval().requires_grad_(False)
        codes = None if self.semantic is None else self.semantic.codes
        self.tokenizer = PixelTokenizer(self.stage, codes, self.image_size, self.grid, self.num_codes)
        if self.decoder_size is not None:
            assert self.start is not None
            self.tokenizer.load_state_dict(read_tensors(self.start))
            self.tokenizer.replace_decoder(self.decoder_size)
        self.criterion = PixelLoss(self.loss_config, build_perceptual(self.loss_config, self.encoder)).to(
            context.device
        )
        gan = self.loss_config.gan
        if gan.adaptive and gan.weight and context.train.zero_stage == 3:
            raise ConfigError(
                "loss.gan.adaptive reads the decoder's last weight whole; set zero_stage below 3 with it."
            )
        self.together = "the adaptive weight of loss.gan" if gan.adaptive and gan.weight else ""
        self.discriminator = PatchGAN(gan.channels, gan.layers) if gan.weight else None
        self.used = torch.zeros(self.num_codes, device=context.device)
        self.rebuilt: Tensor | None = None
        self.shown: Tensor | None = None

    def modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"model": PixelModule(self.tokenizer)}
        return modules if self.discriminator is None else modules | {"discriminator": self.discriminator}

    def peak_lr(self, name: str) -> float:
        return self.loss_config.gan.lr if name == "discriminator" else super().peak_lr(name)

    def zero_stage(self, name: str) -> int:
        """The discriminator is small, and is looked at from outside its engine: whole on every worker."""
        return 0 if name == "discriminator" else super().zero_stage(name)

    def semantic_ids(self, batch: Batch) -> Tensor | None:
        """Semantic codes of a batch: int64 (B, N); computed once a row."""
        if self.semantic is None:
            return None
        pixels, semantic = batch["pixels"], self.semantic
        compute = lambda missing: semantic.encode(self.features(pixels[missing])).int()  # noqa: E731
        return self.memory.get(batch["places"], compute).long()

    @property
    def quantize_from(self) -> int:
        """Step at which the codebooks start; the decoder phase has them from the beginning."""
        return 0 if self.decoder_size is not None else self.stage.init_steps

    def begin_step(self, step: int, engines: Mapping[str, Any], read: StepReader) -> None:
        """At `init_steps`, start the codebooks as k-means of the vectors of the coming batches, alike on all ranks."""
        if step != self.quantize_from or self.decoder_size is not None:
            return
        collectives, train = self.context.collectives, self.context.train
        patches = self.grid[0] * self.grid[1]
        wanted = min(self.num_codes * SAMPLES_PER_ROW, INIT_VECTORS)
        steps = min(math.ceil(wanted / (train.batch_size * patches)), math.ceil(sum(self.sizes) / train.batch_size))
        vectors, ids = [], []
        engines["model"].eval()
        with torch.no_grad():
            for ahead in range(step, step + steps):  # gathered step by step: the order of one worker's batches
                parts = [self._vectors(engines["model"], batch) for batch in read(ahead)]
                vectors.append(collectives.all_gather(torch.cat([p for p, _ in parts])))
                ids.append(collectives.all_gather(torch.cat([i for _, i in parts])))
        vectors_TD, ids_T = torch.cat(vectors), torch.cat(ids)
        codebook = self.tokenizer.codebook
        fresh = type(codebook)(*self._codebook_sizes())
        if collectives.rank == 0:
            fresh.init_from(vectors_TD.cpu(), ids_T.cpu(), self.context.generator(step))
        codes = collectives.broadcast(fresh.codes.detach().to(self.context.device))
        set_parameter(engines["model"], codebook.codes, codes)

    def _vectors(self, engine: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pixel encoder's vectors of a batch (T, D), and the semantic code of each (zeros without guidance)."""
        semantic_ids = self.semantic_ids(batch)
        p_BND, *_ = engine(to_unit(batch["pixels"]), semantic_ids, vectors_only=True)
        p_TD = p_BND.float().flatten(0, 1)
        return p_TD, p_TD.new_zeros(len(p_TD), dtype=torch.int64) if semantic_ids is None else semantic_ids.flatten()

    def _codebook_sizes(self) -> tuple[int, ...]:
        if self.semantic is None:
            return (self.num_codes, self.stage.dim)
        return (self.semantic.num_codes, self.stage.codes, self.stage.dim)

    def loss(
        self, name: str, engines: Mapping[str, Any], batch: Batch, step: int, share: Tensor | None
    ) -> tuple[Tensor, Metrics] | None:
        if name == "discriminator":
            return self._discriminator_loss(engines, batch, step)
        target = to_unit(batch["pixels"])
        quantize = step >= self.quantize_from
        rebuilt, vq, codes, semantic_only = engines[name](target, self.semantic_ids(batch), quantize)
        watching = self.discriminator is not None and gan_active(self.loss_config.gan, step)
        loss, metrics = self.criterion(
            rebuilt,
            target,
            discriminator=engines["discriminator"].module if watching else None,
            last_layer=partial(self._last_layer_gradient, engines[name].module),
            step=step,
        )
        engines[name].module.made = None
        self.rebuilt = rebuilt.detach() if watching else None
        metrics["psnr"] = -10 * torch.log10(metrics["l2"] / 4)
        if self.decoder_size is None:
            loss = loss + self.stage.vq_weight * vq
            metrics["vq"] = vq.detach()
            if codes is not None:
                metrics["codes_in_batch"] = float(len(codes.unique()))
                self.used[codes.flatten()] = 1.0
            if semantic_only is not None:
                other, parts = self.criterion(semantic_only, target)
                loss = loss + other
                metrics["psnr_semantic_only"] = -10 * torch.log10(parts["l2"] / 4)
        return loss, metrics | {"loss": loss.detach()}

    def _last_layer_gradient(self, module: PixelModule, gradient_BCHW: Tensor) -> Tensor:
        """The gradient on the decoder's last weight of a gradient on the rebuilt images; mean over the workers."""
        collectives, weight = self.context.collectives, self.tokenizer.last_layer
        assert module.made is not None
        (own,) = torch.autograd.grad(module.made, weight, gradient_BCHW, retain_graph=True)
        return collectives.all_reduce(own) / collectives.world_size

    def _discriminator_loss(self, engines: Mapping[str, Any], batch: Batch, step: int) -> tuple[Tensor, Metrics] | None:
        if self.rebuilt is None or not gan_active(self.loss_config.gan, step):
            return None
        rebuilt, self.rebuilt = self.rebuilt, None
        return discriminator_loss(engines["discriminator"], rebuilt, to_unit(batch["pixels"]))

    def after_step(self, step: int, engines: Mapping[str, Any]) -> Metrics:
        """Share of all codes that the batch of a logged step uses, over all workers; batches before it are left out."""
        used = self.used.clone()
        self.used.zero_()
        if step < self.quantize_from or self.decoder_size is not None or (step + 1) % self.context.train.log_every:
            return {}
        return {"codes_used": (self.context.collectives.all_reduce(used) > 0).double().mean()}

    def skipped(self, step: int) -> None:
        self.used.zero_()

    def replicated(self, engines: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The pixel codebook, where no worker holds only a part of it."""
        return (
            {} if engines["model"].zero_optimization_stage() == 3 else {"pixel codebook": self.tokenizer.codebook.codes}
        )

    def pictures(self, engines: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Held-out images: input | rebuilt (| from semantic codes alone)."""
        if self.shown is None:
            self.shown = held_out_pixels(self.corpus, self.image_size, self.max_pixels, PICTURES)
        if not len(self.shown):
            return {}
        pixels = self.shown.to(self.context.device)
        ids = None if self.semantic is None else self.semantic.encode(self.features(pixels))
        rebuilt, _, _, semantic_only = engines["model"](to_unit(pixels), ids, True)
        columns = [to_unit(pixels), rebuilt] + ([] if semantic_only is None else [semantic_only])
        return {"reconstruction": picture_grid(columns)}

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """`pixel.safetensors`: the PixelTokenizer's state."""
        state = {name.removeprefix("tokenizer."): tensor for name, tensor in weights["model"].items()}
        write_tensors(storage.join(path, WEIGHTS), state)
        return {}


def held_out_pixels(corpus: str, image_size: int, max_pixels: int, count: int) -> Tensor:
    """The first held-out images: uint8 (n, 3, H, W), n ≤ count."""
    rows: list[Row] = []
    for key in shards.list_shards(corpus, "val"):
        for data in shards.read_shard(corpus, key, ["image"]).column("image").to_pylist()[: count - len(rows)]:
            pixels = images.to_pixels(data, image_size, max_pixels=max_pixels)
            rows.append(Row(0, 0, key, len(rows), {"pixels": pixels}))
        if len(rows) == count:
            break
    return stack_pixels(rows) if rows else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
