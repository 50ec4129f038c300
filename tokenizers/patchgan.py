"""PatchGAN discriminator (Isola et al. 2017, as in VQGAN and LlamaGen)."""

from __future__ import annotations

from torch import Tensor, nn


class PatchGAN(nn.Module):
    """Convolutional discriminator with a logit for each patch.

    Strided 4×4 convolutions with `layers` halvings, channels doubled up to eightfold, weights
    initialized at N(0, 0.02). Group norm in place of batch norm *(choice)*: no running statistics
    that differ between ranks, and the logits of an image do not depend on other images of the
    batch.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 4, 2, 1)
        parts: list[nn.Module] = [nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                _norm(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.body = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, 1, 1))
        self.min_size = smallest_image(layers)
        self.apply(_init)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of images (B, 3, H, W) in [-1, 1].

        A logit sees a patch, 70 px wide with 3 layers.

        Raises:
            ValueError: for images smaller than `min_size`, which have no logit.
        """
        if min(pixels_BCHW.shape[-2:]) < self.min_size:
            raise ValueError(
                f"PatchGAN needs images of at least {self.min_size} px, got {tuple(pixels_BCHW.shape[-2:])}"
            )
        return self.body(self.first(pixels_BCHW.to(self.first.weight.dtype)))


def smallest_image(layers: int) -> int:
    """Smallest side in pixels that gives a discriminator of `layers` layers a logit."""
    return 2**layers * 3


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
