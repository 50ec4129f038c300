"""Sections of the tokenizer: its phases, losses and sizes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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

    weight: Weight = Field(0.0, description="0 is off")
    start_step: NonNegative = 20_000
    ramp_steps: NonNegative = Field(0, description="steps over which the weight rises linearly from start_step on")
    adaptive: bool = Field(False, description="scale by the ratio of gradient norms on the decoder's last layer")
    channels: Positive = 64
    layers: Positive = 3
    lr: Rate = 1e-4


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


class TokenizerSection(Section):
    """The three phases of SemHiTok."""

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
