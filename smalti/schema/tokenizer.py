"""Sections of the tokenizer: its phases, losses and sizes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from smalti.schema.base import (
    IF_SET,
    LATE,
    Fraction,
    NonNegative,
    Positive,
    Rate,
    Section,
    Train,
    Weight,
)


class SemanticStage(Section):
    """SemHiTok stage S: VQ-KD on the encoder's features."""

    dim: Positive = Field(48, description="width of a semantic code")
    vq: Literal["ema", "vanilla", "norm"] = Field(
        "ema",
        description="quantizer: ema: EMA codes (VQ-VAE-2); vanilla: trained codes; norm: trained, L2-normalized codes",
    )
    decay: Fraction = Field(0.99, description="vq: ema: decay of the moving averages per step")
    eps: Rate = Field(1e-5, description="vq: ema: Laplace smoothing of the code counts")
    restart_below: Weight = Field(
        1.0,
        description="EMA count below which a code restarts from a vector of the batch; 0 is off",
    )
    beta: Weight = Field(0.25, description="weight of the commitment loss")
    distill: Literal["cosine", "l2"] = Field(
        "cosine",
        description="loss between decoded and encoder features: 1 - cosine, or mean squared error",
    )
    decoder_layers: Positive = Field(3, description="transformer blocks of the feature decoder")
    decoder_dim: Positive = Field(
        768, description="width of the feature decoder; a multiple of decoder_heads"
    )
    decoder_heads: Positive = Field(12, description="attention heads of the feature decoder")
    train: Train = Field(Train(), description="training of the semantic codebook")


class VitSize(Section):
    """Sizes of a vision transformer."""

    dim: Positive = Field(768, description="width; a multiple of heads")
    layers: Positive = Field(12, description="transformer blocks")
    heads: Positive = Field(12, description="attention heads")
    mlp_ratio: Positive = Field(4, description="MLP width as a multiple of dim")
    skip: bool = Field(
        False,
        description="add a linear map from input to output patches; small models learn faster",
    )


class Perceptual(Section):
    """Perceptual part of the reconstruction loss."""

    kind: Literal["off", "lpips", "encoder"] = Field(
        "off",
        description="off; lpips: LPIPS on VGG16 (arXiv 1801.03924); encoder: features of the frozen encoder",
    )
    weight: Weight = Field(1.0, description="weight of the perceptual loss; 0 is off")
    weights: str | None = Field(None, description="LPIPS-VGG16 weights file (kind: lpips)")


class Gan(Section):
    """Adversarial part of the reconstruction loss: hinge loss, PatchGAN."""

    weight: Weight = Field(0.0, description="weight of the adversarial loss; 0 is off")
    start_step: NonNegative = Field(
        20_000, description="step from which the discriminator trains and its loss counts"
    )
    ramp_steps: NonNegative = Field(
        0, description="steps over which the weight rises linearly after start_step"
    )
    adaptive: bool = Field(
        False,
        description="scale the weight by the ratio of gradient norms at the decoder's last layer (VQGAN)",
    )
    adaptive_range: Annotated[
        tuple[Weight, Weight], Field(strict=False, json_schema_extra=LATE)
    ] = Field((0.0, 1e4), description="bounds of that ratio")
    channels: Positive = Field(64, description="channels of the discriminator's first layer")
    layers: Positive = Field(3, description="halvings of the resolution in the discriminator")
    lr: Rate = Field(1e-4, description="peak learning rate of the discriminator")

    @field_validator("adaptive_range")
    @classmethod
    def _low_first(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"adaptive_range: [low, high] with low above high: {list(bounds)}")
        return bounds


class Loss(Section):
    """Weights of the pixel losses."""

    l1: Weight = Field(0.0, description="weight of the mean absolute error; 0 is off")
    l2: Weight = Field(1.0, description="weight of the mean squared error; 0 is off")
    perceptual: Perceptual = Field(
        Perceptual(), description="perceptual distance to the input image"
    )
    gan: Gan = Field(Gan(), description="adversarial loss")


class PixelStage(Section):
    """SemHiTok stage P: a pixel sub-codebook for each semantic code (SGHC)."""

    codes: Positive = Field(12, description="m, pixel codes per semantic code")
    dim: Positive = Field(8, description="width of a pixel code")
    concat: Literal["dim", "length", "none"] = Field(
        "dim",
        description="join semantic and pixel codes by width (dim), as two tokens (length), or pixel codes alone (none)",
    )
    encoder: VitSize = Field(VitSize(), description="sizes of the pixel encoder")
    decoder: VitSize = Field(VitSize(), description="sizes of the pixel decoder")
    beta: Weight = Field(0.25, description="commitment weight within the quantizer's loss")
    vq_weight: Weight = Field(1.0, description="weight of the quantizer's loss")
    init_steps: NonNegative = Field(
        0,
        description="steps before quantization starts; the sub-codebooks are then initialized by k-means of the vectors so far",
    )
    semantic_only_decoder: bool = Field(
        False,
        description="also train a decoder of the same size on semantic codes alone, for comparison",
    )
    loss: Loss = Field(Loss(), description="reconstruction losses")
    train: Train = Field(Train(), description="training of the pixel branch")


class DecoderStage(Section):
    """SemHiTok stage D: a larger pixel decoder, everything else frozen."""

    decoder: VitSize = Field(
        VitSize(dim=1024, layers=24, heads=16), description="sizes of the larger pixel decoder"
    )
    loss: Loss = Field(Loss(), description="reconstruction losses")
    train: Train = Field(Train(), description="training of the larger decoder")


class DualStage(Section):
    """DualToken: one trained encoder, residual codes for pixels and semantics."""

    codes: Positive = Field(16_384, description="K, codes of each of the two codebooks")
    dim: Positive = Field(32, description="width of a code")
    depth: Positive = Field(8, description="D, residual codes per patch in each codebook")
    pixel_layers: list[Positive] = Field(
        [6, 4], description="encoder blocks whose weighted outputs are summed for the pixel codes"
    )
    pixel_weights: list[Rate] = Field([1.0, 0.6], description="weight of each of the pixel_layers")
    decay: Fraction = Field(0.99, description="decay of the codes' moving averages per step")
    eps: Rate = Field(1e-5, description="Laplace smoothing of the code counts")
    restart_below: Weight = Field(
        1.0,
        description="EMA count below which a code restarts from a vector of the batch; 0 is off",
    )
    init_steps: NonNegative = Field(
        0,
        description="steps before quantization starts; the codebooks are then initialized by k-means of the vectors so far",
    )
    commitment: Weight = Field(5.0, description="weight of the commitment loss of both codebooks")
    semantic_weight: Weight = Field(
        1.0, description="weight of the distance to the features of the encoder before training"
    )
    decoder: VitSize = Field(VitSize(), description="sizes of the pixel decoder")
    loss: Loss = Field(Loss(), description="reconstruction losses")
    train: Train = Field(Train(), description="training of encoder, codebooks and decoder")

    @model_validator(mode="after")
    def _a_weight_a_layer(self) -> DualStage:
        if not self.pixel_layers or len(self.pixel_layers) != len(self.pixel_weights):
            raise ValueError(
                f"pixel_layers {self.pixel_layers} and pixel_weights {self.pixel_weights}: expected one weight per layer"
            )
        return self


class TokenizerSection(Section):
    """Training phases of the tokenizer: SemHiTok's three, or `dual`, DualToken's one."""

    guidance: bool = Field(
        True,
        description="false: one flat pixel codebook of codebook.size x pixel.codes, no semantic codes",
    )
    encoder_precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="precision of the frozen encoder in all phases; auto: on GPUs the phase's train.precision, else fp32",
        json_schema_extra=IF_SET,
    )
    semantic: SemanticStage = Field(SemanticStage(), description="semhitok: semantic codebook")
    pixel: PixelStage = Field(PixelStage(), description="semhitok: pixel sub-codebooks")
    decoder: DecoderStage | None = Field(
        None, description="semhitok: train a larger pixel decoder afterwards; null: skip"
    )
    dual: DualStage = Field(
        DualStage(), description="dualtoken: the tokenizer's one phase", json_schema_extra=LATE
    )
