"""Losses: values by hand, gradients to the right places, adversarial switches.

Covers: tokenizers/patchgan.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.schema import Gan, Loss, Perceptual
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.losses import (
    EncoderPerceptual,
    PixelLoss,
    adaptive_weight,
    build_perceptual,
    discriminator_loss,
    distill_loss,
    gan_active,
    gan_weight,
    hinge_discriminator,
    hinge_generator,
)
from smalti.tokenizers.patchgan import PatchGAN


def test_distillation_by_hand() -> None:
    a, b = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[6.0, 8.0], [0.0, 2.0]]])
    assert float(distill_loss(a, b, "cosine")) == pytest.approx(0.5, abs=1e-6)
    assert float(distill_loss(a, b, "l2")) == pytest.approx((9 + 16 + 1 + 4) / 4)
    with pytest.raises(ValueError, match="cosine or l2"):
        distill_loss(a, b, "l1")


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert float(hinge_discriminator(real, fake)) == pytest.approx(0.5 * (0.25 + 0.75))
    assert float(hinge_generator(fake)) == pytest.approx(1.25)


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight((3 * w).sum(), (w * torch.tensor([0.3, 0.4])).sum(), w)
    assert float(weight) == pytest.approx(3 * 2**0.5 / (0.5 + 1e-4))
    assert not weight.requires_grad
    assert float(adaptive_weight((3 * w).sum(), (w * 1e-9).sum(), w, high=10.0)) == 10


def test_adaptive_weight_through_a_function_runs_no_hook_of_the_images(pixels: Tensor) -> None:
    """An engine's hooks on its outputs are made for one backward: the two gradients must not run
    them.
    """
    discriminator, layer, ran = PatchGAN(8), nn.Conv2d(3, 3, 1), []
    loss_of = PixelLoss(Loss(gan=Gan(weight=0.5, start_step=0, adaptive=True)))
    made = layer(pixels)
    rebuilt = made.view_as(made)
    rebuilt.register_hook(lambda gradient: ran.append(1))

    def gradient(of_images: Tensor) -> Tensor:
        return torch.autograd.grad(made, layer.weight, of_images, retain_graph=True)[0]

    loss, metrics = loss_of(rebuilt, pixels, discriminator=discriminator, last_layer=gradient)
    assert not ran
    _, plain = loss_of(layer(pixels), pixels, discriminator=discriminator, last_layer=layer.weight)
    torch.testing.assert_close(metrics["gan_weight"], plain["gan_weight"])
    loss.backward()
    assert ran == [1]
    bounded = Loss(gan=Gan(weight=0.5, start_step=0, adaptive=True, adaptive_range=[1e-9, 1e-6]))
    _, found = PixelLoss(bounded)(
        layer(pixels), pixels, discriminator=discriminator, last_layer=layer.weight
    )
    assert float(found["gan_weight"]) == pytest.approx(0.5e-6) and float(plain["gan_weight"]) > 1e-4


def test_pixel_loss_weights_its_parts(pixels: Tensor) -> None:
    rebuilt = pixels + 0.5
    loss, metrics = PixelLoss(Loss(l1=0.2, l2=1.0))(rebuilt, pixels)
    assert float(loss) == pytest.approx(0.2 * 0.5 + 0.25, rel=1e-5)
    assert float(metrics["l1"]) == pytest.approx(0.5, rel=1e-5)
    assert float(metrics["l2"]) == pytest.approx(0.25, rel=1e-5)


def test_generator_sees_the_discriminator_and_leaves_it_alone(pixels: Tensor) -> None:
    config = Loss(gan=Gan(weight=0.5, start_step=3, adaptive=True))
    discriminator, layer = PatchGAN(8), nn.Conv2d(3, 3, 1)
    loss_of = PixelLoss(config)
    early, metrics = loss_of(
        layer(pixels), pixels, discriminator=discriminator, last_layer=layer.weight, step=2
    )
    assert "gan" not in metrics
    assert not gan_active(config.gan, 2)
    assert gan_active(config.gan, 3)
    rebuilt = layer(pixels)
    loss, metrics = loss_of(
        rebuilt, pixels, discriminator=discriminator, last_layer=layer.weight, step=3
    )
    expected = early + metrics["gan_weight"] * hinge_generator(discriminator(rebuilt))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert layer.weight.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    with pytest.raises(ValueError, match="last layer"):
        loss_of(layer(pixels), pixels, discriminator=discriminator, step=3)


def test_the_adversarial_weight_rises_evenly_from_its_start(pixels: Tensor) -> None:
    ramp = Gan(weight=0.8, start_step=10, ramp_steps=3)
    assert [gan_weight(ramp, step) for step in (0, 9, 10, 11, 12, 13, 99)] == pytest.approx(
        [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8]
    )
    assert [gan_weight(Gan(weight=0.8, start_step=10), step) for step in (9, 10)] == [0, 0.8]
    _, metrics = PixelLoss(Loss(gan=ramp))(pixels, pixels, discriminator=PatchGAN(8, 1), step=11)
    assert float(metrics["gan_weight"]) == pytest.approx(0.4)


def test_discriminator_loss_trains_the_discriminator_alone(pixels: Tensor) -> None:
    discriminator, layer = PatchGAN(8), nn.Conv2d(3, 3, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3)
    first = None
    for _ in range(30):
        loss, metrics = discriminator_loss(discriminator, layer(pixels), pixels)
        first = loss.detach() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.weight.grad is None
    assert loss.detach() < 0.7 * first
    assert metrics["logits_real"] > metrics["logits_fake"]


def test_patchgan_logits_are_local_and_independent_of_the_batch(pixels: Tensor) -> None:
    model = PatchGAN(8).eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    torch.testing.assert_close(model(pixels)[:1], model(pixels[:1]))
    with pytest.raises(ValueError, match="24 px"):
        model(torch.zeros(1, 3, 16, 16))


def test_patchgan_has_the_published_size() -> None:
    counted = sum(p.numel() for p in PatchGAN(64, 3).parameters())
    first, last = 3 * 64 * 16 + 64, 512 * 16 + 1
    inner = sum(16 * a * b + 2 * b for a, b in ((64, 128), (128, 256), (256, 512)))
    assert counted == first + inner + last == 2_765_633


def test_encoder_perceptual_moves_pixels_and_not_the_encoder(
    encoder: VisionEncoder, pixels: Tensor
) -> None:
    config = Loss(l2=0.0, perceptual=Perceptual(kind="encoder", weight=2.0))
    loss_of = PixelLoss(config, build_perceptual(config, encoder))
    rebuilt = (pixels * 0.5).requires_grad_(True)
    loss, metrics = loss_of(rebuilt, pixels)
    assert float(loss.detach()) == pytest.approx(2 * float(metrics["perceptual"]))
    loss.backward()
    assert rebuilt.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.parameters())
    assert float(EncoderPerceptual(encoder)(pixels, pixels).max()) < 1e-5


def test_what_a_recipe_asks_for_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"perceptual\.weights"):
        build_perceptual(Loss(perceptual=Perceptual(kind="lpips")))
    with pytest.raises(ConfigError, match="frozen encoder"):
        build_perceptual(Loss(perceptual=Perceptual(kind="encoder")))
    assert build_perceptual(Loss()) is None
    with pytest.raises(ValueError, match="kind=lpips"):
        PixelLoss(Loss(perceptual=Perceptual(kind="lpips")))
