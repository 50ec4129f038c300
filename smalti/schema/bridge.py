"""Section of the bridge from codes to a diffusion decoder."""

from __future__ import annotations

from pydantic import Field

from smalti.schema.base import Positive, Rate, Section, Train, Weight


class BridgeSection(Section):
    """UniCode²'s mapping from an image's codes to the conditioning of a pretrained diffusion decoder."""

    decoder: str = Field(
        description="a text-to-image pipeline of diffusers (Stable Diffusion, SDXL, FLUX): folder or hub name"
    )
    width: Positive = 1024
    layers: Positive = 6
    heads: Positive = 16
    temperature: Rate = Field(0.07, description="of InfoNCE")
    regression: Weight = Field(
        1.0, description="weight of the squared error beside InfoNCE, which leaves lengths and constant places open"
    )
    steps: Positive = Field(50, description="denoising steps of a drawing")
    guidance: Weight = Field(3.5, description="guidance scale of the diffusion decoder")
    train: Train = Train()
