"""What the tasks that rebuild images share: the pixel losses, a discriminator with an engine of its
own, held-out pictures.

Axis letters: B images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smalti import images, shards
from smalti.errors import ConfigError
from smalti.schema import Loss
from smalti.tokenizers.losses import PixelLoss, build_perceptual, discriminator_loss, gan_active
from smalti.tokenizers.patchgan import PatchGAN
from smalti.workflows.train.task import Batch, Context, Metrics, Row
from smalti.workflows.train.tasks.images import stack_pixels, to_unit
from smalti.workflows.train.tasks.semantic import ImageTask

PICTURES = 8


class RebuildModule(nn.Module):
    """What a main engine wraps: a model whose outputs are a plain tuple, as DeepSpeed's hooks want
    them.

    `made`: the rebuilt images of the last forward before those hooks, through which a gradient can
    be taken beside the engine's backward.
    """

    made: Tensor | None = None

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, for the adaptive GAN weight."""
        raise NotImplementedError


class RebuildTask(ImageTask):
    """Base of the tasks that rebuild images; `loss`: weights of the pixel losses."""

    def __init__(self, loss: Loss, **images_of: Any) -> None:
        super().__init__(**images_of)
        self.loss_config = loss

    def setup_losses(self, context: Context, *, load: bool = True) -> None:
        """In `setup`, after the model is built: what images are compared by, and the discriminator."""
        perceptual = build_perceptual(self.loss_config, self.encoder, load=load)
        self.criterion = PixelLoss(self.loss_config, perceptual)
        if load:
            self.criterion.to(context.device)
        gan = self.loss_config.gan
        if gan.adaptive and gan.weight and context.train.zero_stage == 3:
            raise ConfigError(
                "loss.gan.adaptive reads the decoder's last weight whole; set zero_stage below 3 with it."
            )
        self.together = "the adaptive weight of loss.gan" if gan.adaptive and gan.weight else ""
        self.discriminator = PatchGAN(gan.channels, gan.layers) if gan.weight else None
        self.rebuilt: Tensor | None = None
        self.shown: Tensor | None = None

    def main_module(self) -> RebuildModule:
        """What rebuilds images."""
        raise NotImplementedError

    def modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"model": self.main_module()}
        return (
            modules
            if self.discriminator is None
            else modules | {"discriminator": self.discriminator}
        )

    def frozen_modules(self) -> dict[str, nn.Module]:
        return super().frozen_modules() | {"criterion": self.criterion}

    def peak_lr(self, name: str) -> float:
        return self.loss_config.gan.lr if name == "discriminator" else super().peak_lr(name)

    def zero_stage(self, name: str) -> int:
        """The discriminator is small, and is looked at from outside its engine: whole on every
        worker.
        """
        return 0 if name == "discriminator" else super().zero_stage(name)

    def image_loss(
        self, engines: Mapping[str, Any], rebuilt: Tensor, target: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the images that the main engine made just now, and its parts; keeps them for the
        discriminator.
        """
        watching = self.discriminator is not None and gan_active(self.loss_config.gan, step)
        module: RebuildModule = engines["model"].module
        loss, metrics = self.criterion(
            rebuilt,
            target,
            discriminator=engines["discriminator"].module if watching else None,
            last_layer=partial(self._last_layer_gradient, module),
            step=step,
        )
        module.made = None
        self.rebuilt = rebuilt.detach() if watching else None
        metrics["psnr"] = -10 * torch.log10(metrics["l2"] / 4)
        return loss, metrics

    def _last_layer_gradient(self, module: RebuildModule, gradient_BCHW: Tensor) -> Tensor:
        """The gradient on the decoder's last weight of a gradient on the rebuilt images; mean over
        the workers.
        """
        collectives = self.context.collectives
        assert module.made is not None
        (own,) = torch.autograd.grad(
            module.made, module.last_layer, gradient_BCHW, retain_graph=True
        )
        return collectives.all_reduce(own) / collectives.world_size

    def discriminator_loss(
        self, engines: Mapping[str, Any], batch: Batch, step: int
    ) -> tuple[Tensor, Metrics] | None:
        """Loss of the discriminator on the images that were rebuilt last; None before it takes
        part.
        """
        if self.rebuilt is None or not gan_active(self.loss_config.gan, step):
            return None
        rebuilt, self.rebuilt = self.rebuilt, None
        return discriminator_loss(engines["discriminator"], rebuilt, to_unit(batch["pixels"]))

    def held_out(self) -> Tensor:
        """Held-out images to show: uint8 (n, 3, H, W) on the device, n ≤ `PICTURES`."""
        if self.shown is None:
            self.shown = held_out_pixels(self.corpus, self.image_size, self.max_pixels, PICTURES)
        return self.shown.to(self.context.device)


def held_out_pixels(corpus: str, image_size: int, max_pixels: int, count: int) -> Tensor:
    """The first held-out images: uint8 (n, 3, H, W), n ≤ count."""
    rows: list[Row] = []
    for key in shards.list_shards(corpus, "val"):
        for data in (
            shards.read_shard(corpus, key, ["image"])
            .column("image")
            .to_pylist()[: count - len(rows)]
        ):
            pixels = images.to_pixels(data, image_size, max_pixels=max_pixels)
            rows.append(Row(0, 0, key, len(rows), {"pixels": pixels}))
        if len(rows) == count:
            break
    return (
        stack_pixels(rows) if rows else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    )
