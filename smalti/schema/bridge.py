"""Section of the bridge from codes to a diffusion decoder."""

from __future__ import annotations

from pydantic import Field

from smalti.schema.base import Positive, Rate, Section, Train, Weight


class BridgeSection(Section):
    """UniCode²'s map from image codes to the conditioning of a diffusion decoder."""

    decoder: str = Field(
        description="a text-to-image pipeline of diffusers (Stable Diffusion, SDXL, FLUX): folder or hub name"
    )
    width: Positive = Field(
        1024, description="width of the bridge's transformer; a multiple of heads"
    )
    layers: Positive = Field(6, description="transformer blocks")
    heads: Positive = Field(16, description="attention heads")
    temperature: Rate = Field(0.07, description="temperature of the InfoNCE loss")
    regression: Weight = Field(
        1.0,
        description="weight of the squared error added to InfoNCE, which does not determine lengths and constant positions",
    )
    steps: Positive = Field(50, description="denoising steps per drawn image")
    guidance: Weight = Field(3.5, description="guidance scale of the diffusion decoder")
    train: Train = Field(Train(), description="training of the bridge")
