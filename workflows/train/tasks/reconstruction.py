"""What tasks that reconstruct images share.

Pixel losses, a discriminator with its own engine, held-out pictures.

Axis letters: B images, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor, nn

from smalti import images, shards
from smalti.errors import ConfigError
from smalti.schema import Loss
from smalti.tokenizers.losses import PixelLoss, build_perceptual, discriminator_loss, gan_active
from smalti.tokenizers.patchgan import PatchGAN
from smalti.workflows.train.task import Batch, Context, Metrics, Row
from smalti.workflows.train.tasks.images import ImageSettings, ImageTask, stack_pixels, to_unit

if TYPE_CHECKING:
    from smalti.workflows.train.deepspeed_compat import Engine

PICTURES = 8


class ReconstructionModule(nn.Module, ABC):
    """The module of the main engine; its outputs are a plain tuple, as DeepSpeed's hooks need.

    Attributes:
        reconstructed: the images of the last forward, before those hooks: through them a gradient
            can be taken apart from the engine's backward.
    """

    reconstructed: Tensor | None = None

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The decoder's last weight, for the adaptive GAN weight."""


class ReconstructionTask(ImageTask, ABC):
    """Base of tasks that reconstruct images.

    Args:
        loss: weights of the pixel losses.
        images: see `ImageTask`.
    """

    def __init__(self, loss: Loss, **images: Unpack[ImageSettings]) -> None:
        super().__init__(**images)
        self.loss_config = loss

    def setup_losses(self, context: Context, *, load: bool = True) -> None:
        """Build the pixel losses and the discriminator, after the model.

        Args:
            context: device and settings of the run.
            load: see `ImageTask.build`.

        Raises:
            ConfigError: if the adaptive GAN weight cannot be computed under this ZeRO stage.
        """
        perceptual = build_perceptual(self.loss_config, self.encoder, load=load)
        self.criterion = PixelLoss(self.loss_config, perceptual)
        if load:
            self.criterion.to(context.device)
        gan = self.loss_config.gan
        if gan.adaptive and gan.weight and context.train.zero_stage == 3:
            raise ConfigError(
                "loss.gan.adaptive reads the whole last weight of the decoder, which zero_stage=3 "
                "partitions; set zero_stage below 3 with it."
            )
        self.together = "the adaptive weight of loss.gan" if gan.adaptive and gan.weight else ""
        self.discriminator = PatchGAN(gan.channels, gan.layers) if gan.weight else None
        self.reconstructed: Tensor | None = None
        self.shown: Tensor | None = None

    @abstractmethod
    def main_module(self) -> ReconstructionModule:
        """The module that reconstructs images."""

    def modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"model": self.main_module()}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return modules

    def frozen_modules(self) -> dict[str, nn.Module]:
        return super().frozen_modules() | {"criterion": self.criterion}

    def peak_lr(self, name: str) -> float:
        return self.loss_config.gan.lr if name == "discriminator" else super().peak_lr(name)

    def zero_stage(self, name: str) -> int:
        """0 for the discriminator: it is small, and is also used outside its engine."""
        return 0 if name == "discriminator" else super().zero_stage(name)

    def image_loss(
        self, engines: Mapping[str, Engine], reconstructed: Tensor, target: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Loss of the images that the main engine has just reconstructed.

        They are kept for the discriminator.

        Returns:
            The loss, and its parts.
        """
        adversarial = self.discriminator is not None and gan_active(self.loss_config.gan, step)
        module = engines["model"].module
        assert isinstance(module, ReconstructionModule)
        loss, metrics = self.criterion(
            reconstructed,
            target,
            discriminator=engines["discriminator"].module if adversarial else None,
            last_layer=partial(self._last_layer_gradient, module),
            step=step,
        )
        module.reconstructed = None
        self.reconstructed = reconstructed.detach() if adversarial else None
        metrics["psnr"] = -10 * torch.log10(metrics["l2"] / 4)
        return loss, metrics

    def _last_layer_gradient(self, module: ReconstructionModule, gradient_BCHW: Tensor) -> Tensor:
        """The gradient on the decoder's last weight, averaged over the workers.

        Args:
            module: the module of the main engine.
            gradient_BCHW: the gradient on the reconstructed images.
        """
        collectives = self.context.collectives
        assert module.reconstructed is not None
        (own,) = torch.autograd.grad(
            module.reconstructed, module.last_layer, gradient_BCHW, retain_graph=True
        )
        return collectives.all_reduce(own) / collectives.world_size

    def discriminator_loss(
        self, engines: Mapping[str, Engine], batch: Batch, step: int
    ) -> tuple[Tensor, Metrics] | None:
        """Loss of the discriminator on the last reconstructed images; None before it starts."""
        if self.reconstructed is None or not gan_active(self.loss_config.gan, step):
            return None
        reconstructed = self.reconstructed
        self.reconstructed = None
        return discriminator_loss(engines["discriminator"], reconstructed, to_unit(batch["pixels"]))

    def held_out(self) -> Tensor:
        """Held-out images to show: uint8 (n, 3, H, W) on the device, n ≤ `PICTURES`."""
        if self.shown is None:
            self.shown = held_out_pixels(self.corpus, self.image_size, self.max_pixels, PICTURES)
        return self.shown.to(self.context.device)


def held_out_pixels(corpus: str, image_size: int, max_pixels: int, count: int) -> Tensor:
    """The first held-out images: uint8 (n, 3, H, W), n ≤ count."""
    rows: list[Row] = []
    for key in shards.list_shards(corpus, "val"):
        column = shards.read_shard(corpus, key, ["image"]).column("image").to_pylist()
        for data in column[: count - len(rows)]:
            pixels = images.to_pixels(data, image_size, max_pixels=max_pixels)
            rows.append(Row(0, 0, key, len(rows), {"pixels": pixels}))
        if len(rows) == count:
            break
    if not rows:
        return torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    return stack_pixels(rows)
