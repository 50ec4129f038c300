"""Losses of the tokenizers: distillation, reconstruction, perceptual, hinge GAN.

Axis letters: B batch, N tokens, C feature width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.schema import Gan, Loss

LastLayer = Tensor | Callable[[Tensor], Tensor]
"""The decoder's last weight, or a function from the gradient on the images to the gradient on that
weight.
"""


def distill_loss(rebuilt_BNC: Tensor, target_BNC: Tensor, kind: str) -> Tensor:
    """`cosine`: mean(1 − cos) over tokens (BEiT-2); `l2`: mean squared error over elements.

    Float32 scalar.
    """
    rebuilt = rebuilt_BNC.float()
    target = target_BNC.detach().float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(rebuilt, target, dim=-1)).mean()
    if kind == "l2":
        return F.mse_loss(rebuilt, target)
    raise ValueError(f"distillation is {kind!r}, expected cosine or l2")


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator: mean of ½(relu(1 − real) + relu(1 + fake)), as in VQGAN and
    LlamaGen.
    """
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """Generator's side of the hinge loss: −mean(fake)."""
    return -fake_logits.float().mean()


def adaptive_weight(
    nll: Tensor,
    gan: Tensor,
    last_layer: LastLayer,
    low: float = 0.0,
    high: float = 1e4,
    rebuilt: Tensor | None = None,
) -> Tensor:
    """‖∇nll‖ / (‖∇gan‖ + 1e-4) on the decoder's last layer, clamped (VQGAN): detached scalar.

    Args:
        rebuilt: images that both losses depend on; needed if `last_layer` is a function.
    """

    def norm(loss: Tensor) -> Tensor:
        if isinstance(last_layer, Tensor):
            return torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        assert rebuilt is not None
        return last_layer(torch.autograd.grad(loss, rebuilt, retain_graph=True)[0]).float().norm()

    return (norm(nll) / (norm(gan) + 1e-4)).clamp(low, high).detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze `module`'s weights; gradients still flow through it to its inputs."""
    held = [p for p in module.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


def gan_active(config: Gan, step: int) -> bool:
    """Whether the adversarial loss is active at this step (0-based)."""
    return config.weight > 0 and step >= config.start_step


def gan_weight(config: Gan, step: int) -> float:
    """Weight of the adversarial loss at this step (0-based).

    0 before `start_step`, then a linear ramp over `ramp_steps` steps to `weight`.
    """
    if not gan_active(config, step):
        return 0.0
    return config.weight * min(1.0, (step - config.start_step + 1) / (config.ramp_steps + 1))


class EncoderPerceptual(nn.Module):
    """Perceptual distance in a frozen encoder's features: mean over patches of 1 − cosine, (B,)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distance of images in [-1, 1]; the second takes no gradient."""
        with torch.no_grad():
            target_BNC = self.encoder(b_BCHW.float())
        return (
            1
            - F.cosine_similarity(self.encoder(a_BCHW.float()).float(), target_BNC.float(), dim=-1)
        ).mean(-1)


def build_perceptual(
    config: Loss, encoder: nn.Module | None = None, *, load: bool = True
) -> nn.Module | None:
    """The perceptual distance of a recipe, or None if it is off.

    Args:
        load: False leaves LPIPS without its weights.

    Raises:
        ConfigError: if weights or the encoder are missing.
    """
    if config.perceptual.kind == "off" or config.perceptual.weight == 0:
        return None
    if config.perceptual.kind == "encoder":
        if encoder is None:
            raise ConfigError("loss.perceptual.kind=encoder needs the frozen encoder.")
        return EncoderPerceptual(encoder)
    from smalti.tokenizers.lpips import LPIPS

    if not load:
        return LPIPS()
    if not config.perceptual.weights:
        raise ConfigError(
            "loss.perceptual.kind=lpips needs loss.perceptual.weights, a file made by lpips.convert."
        )
    return LPIPS.from_file(config.perceptual.weights)


class PixelLoss(nn.Module):
    """λ1·L1 + λ2·L2 + λp·perceptual + λg·GAN of reconstructed images (generator's side).

    Args:
        perceptual: frozen module (a, b) → (B,), as `build_perceptual` returns it; required if the
            recipe sets one.
    """

    def __init__(self, config: Loss, perceptual: nn.Module | None = None) -> None:
        super().__init__()
        wanted = config.perceptual.kind != "off" and config.perceptual.weight > 0
        if wanted != (perceptual is not None):
            raise ValueError(
                f"loss.perceptual.kind={config.perceptual.kind}, but the perceptual module is {perceptual}"
            )
        self.config = config
        self.perceptual = (
            perceptual.requires_grad_(False).eval() if perceptual is not None else None
        )

    def forward(
        self,
        rebuilt_BCHW: Tensor,
        target_BCHW: Tensor,
        *,
        discriminator: nn.Module | None = None,
        last_layer: LastLayer | None = None,
        step: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (float32 scalar) and its detached parts.

        Args:
            rebuilt_BCHW, target_BCHW: images in [-1, 1].
            discriminator: adds the adversarial part from `gan.start_step` on; its weights get no
                gradient here.
            last_layer: the decoder's last weight, or a function to the gradient on it; needed for
                `gan.adaptive`.
            step: optimizer step, 0-based.
        """
        # a view: gradients taken here skip hooks on the argument
        rebuilt_BCHW = rebuilt_BCHW.view_as(rebuilt_BCHW)
        rebuilt = rebuilt_BCHW.float()
        target = target_BCHW.float()
        l1 = F.l1_loss(rebuilt, target)
        l2 = F.mse_loss(rebuilt, target)
        loss = self.config.l1 * l1 + self.config.l2 * l2
        metrics = {"l1": l1.detach(), "l2": l2.detach()}
        if self.perceptual is not None:
            perceptual = self.perceptual(rebuilt, target).mean()
            loss = loss + self.config.perceptual.weight * perceptual
            metrics["perceptual"] = perceptual.detach()
        if discriminator is not None and gan_active(self.config.gan, step):
            with frozen(discriminator):
                gan = hinge_generator(discriminator(rebuilt_BCHW))
            weight = torch.tensor(gan_weight(self.config.gan, step), device=loss.device)
            if self.config.gan.adaptive:
                if last_layer is None:
                    raise ValueError("gan.adaptive needs the decoder's last layer")
                weight = weight * adaptive_weight(
                    loss, gan, last_layer, *self.config.gan.adaptive_range, rebuilt=rebuilt_BCHW
                )
            loss = loss + weight * gan
            metrics |= {"gan": gan.detach(), "gan_weight": weight}
        metrics["pixel_loss"] = loss.detach()
        return loss, metrics


def discriminator_loss(
    discriminator: Callable[[Tensor], Tensor], rebuilt_BCHW: Tensor, target_BCHW: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hinge loss of the discriminator on detached images, and its metrics."""
    rebuilt = rebuilt_BCHW.detach()
    real = discriminator(target_BCHW.to(rebuilt.dtype))
    fake = discriminator(rebuilt)
    loss = hinge_discriminator(real, fake)
    metrics = {
        "discriminator": loss.detach(),
        "logits_real": real.detach().mean(),
        "logits_fake": fake.detach().mean(),
    }
    return loss, metrics
