"""Sections of the tokenizer: its phases, losses and sizes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from smalti.schema.base import Fraction, NonNegative, Positive, Rate, Section, Train, Weight


class SemanticStage(Section):
    """SemHiTok stage S: VQ-KD on the encoder's features."""

    dim: Positive = Field(48, description="width of a semantic code")
    vq: Literal["ema", "vanilla", "norm"] = "ema"
    decay: Fraction = 0.99
    eps: Rate = 1e-5
    restart_below: Weight = Field(1.0, description="EMA count under which a code restarts; 0 is off")
    beta: Weight = Field(0.25, description="commitment weight")
    distill: Literal["cosine", "l2"] = "cosine"
    decoder_layers: Positive = 3
    decoder_dim: Positive = 768
    decoder_heads: Positive = 12
    train: Train = Train()


class VitSize(Section):
    """Sizes of a vision transformer."""

    dim: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    mlp_ratio: Positive = 4
    skip: bool = Field(False, description="add a linear map from input to output patches: small models learn faster")


class Perceptual(Section):
    """Perceptual part of the reconstruction loss."""

    kind: Literal["off", "lpips", "encoder"] = "off"
    weight: Weight = 1.0
    weights: str | None = Field(None, description="LPIPS-VGG16 weights file (kind: lpips)")


class Gan(Section):
    """Adversarial part of the reconstruction loss: hinge loss, PatchGAN."""

    late = ("adaptive_range",)

    weight: Weight = Field(0.0, description="0 is off")
    start_step: NonNegative = 20_000
    ramp_steps: NonNegative = Field(0, description="steps over which the weight rises linearly from start_step on")
    adaptive: bool = Field(False, description="scale by the ratio of gradient norms on the decoder's last layer")
    adaptive_range: Annotated[tuple[Weight, Weight], Field(strict=False)] = Field(
        (0.0, 1e4), description="bounds of that ratio"
    )
    channels: Positive = 64
    layers: Positive = 3
    lr: Rate = 1e-4

    @field_validator("adaptive_range")
    @classmethod
    def _low_first(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"adaptive_range: [low, high] with low above high: {list(bounds)}")
        return bounds


class Loss(Section):
    """Weights of the pixel losses."""

    l1: Weight = 0.0
    l2: Weight = 1.0
    perceptual: Perceptual = Perceptual()
    gan: Gan = Gan()


class PixelStage(Section):
    """SemHiTok stage P: a pixel sub-codebook for each semantic code (SGHC)."""

    codes: Positive = Field(12, description="m, sub-codes of each semantic code")
    dim: Positive = Field(8, description="width of a pixel code")
    concat: Literal["dim", "length", "none"] = "dim"
    encoder: VitSize = VitSize()
    decoder: VitSize = VitSize()
    beta: Weight = 0.25
    vq_weight: Weight = 1.0
    init_steps: NonNegative = Field(
        0, description="steps before quantisation starts; the sub-codebooks are then k-means of what was seen"
    )
    semantic_only_decoder: bool = Field(
        False, description="also train the same decoder on semantic codes alone, for comparison"
    )
    loss: Loss = Loss()
    train: Train = Train()


class DecoderStage(Section):
    """SemHiTok stage D: a larger pixel decoder, everything else frozen."""

    decoder: VitSize = VitSize(dim=1024, layers=24, heads=16)
    loss: Loss = Loss()
    train: Train = Train()


class DualStage(Section):
    """DualToken: one trained encoder; residual codes of shallow layers for pixels, of `encoder.layer` for meaning."""

    codes: Positive = Field(16_384, description="K, codes of each of the two codebooks")
    dim: Positive = Field(32, description="width of a code")
    depth: Positive = Field(8, description="D, codes of a patch in each codebook")
    pixel_layers: list[Positive] = Field(
        [6, 4], description="blocks whose outputs, weighted and summed, are the pixels'"
    )
    pixel_weights: list[Rate] = Field([1.0, 0.6], description="a weight for each of them")
    decay: Fraction = 0.99
    eps: Rate = 1e-5
    restart_below: Weight = Field(1.0, description="EMA count under which a code restarts; 0 is off")
    init_steps: NonNegative = Field(
        0, description="steps before quantisation starts; the codebooks are then k-means of what was seen"
    )
    commitment: Weight = Field(5.0, description="weight of the commitment of both codebooks")
    semantic_weight: Weight = Field(1.0, description="weight of the distance to the features of the encoder as it was")
    decoder: VitSize = VitSize()
    loss: Loss = Loss()
    train: Train = Train()

    @model_validator(mode="after")
    def _a_weight_a_layer(self) -> DualStage:
        if not self.pixel_layers or len(self.pixel_layers) != len(self.pixel_weights):
            raise ValueError(
                f"pixel_layers {self.pixel_layers} and pixel_weights {self.pixel_weights}: expected a weight for each layer"
            )
        return self


class TokenizerSection(Section):
    """How the tokenizer is made: SemHiTok's three phases, or `dual`, DualToken's one."""

    late = ("dual",)

    guidance: bool = Field(
        True, description="false: one flat pixel codebook of codebook.size x pixel.codes, no semantic codes"
    )
    encoder_precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the frozen encoder in these phases; auto: on GPUs the phase's train.precision, else fp32",
    )
    semantic: SemanticStage = SemanticStage()
    pixel: PixelStage = PixelStage()
    decoder: DecoderStage | None = None
    dual: DualStage = DualStage()
