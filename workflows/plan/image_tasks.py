"""Training tasks over images and codes, built on the meta device for the planner."""

from __future__ import annotations

from typing import TypedDict

import torch

from smalti.mllm.diffusion import PromptSide
from smalti.schema import Recipe, Train
from smalti.tokenizers.encoders import VisionEncoder
from smalti.workflows.plan.models import Model, encoder_of
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.task import Context
from smalti.workflows.train.tasks.bridge import BridgeTask
from smalti.workflows.train.tasks.dual import DualTask
from smalti.workflows.train.tasks.encoder import EncoderTask
from smalti.workflows.train.tasks.images import ImageTask, encodes_in_bf16
from smalti.workflows.train.tasks.pixel import PixelTask
from smalti.workflows.train.tasks.semantic import SemanticTask

MANY = 1 << 40
"""Rows of a corpus whose features do not fit into a task's memory of them."""


class Images(TypedDict):
    """Arguments that tasks over images share."""

    corpus: str
    keys: list[str]
    sizes: list[int]
    image_size: int
    max_pixels: int
    encoder: str | None
    layer: int
    encoder_precision: str


def images_of(recipe: Recipe, size: int) -> Images:
    """Arguments for a corpus that does not exist yet: many images of `size` pixels."""
    return {
        "corpus": "",
        "keys": [],
        "sizes": [MANY],
        "image_size": size,
        "max_pixels": recipe.corpus.max_pixels,
        "encoder": None,
        "layer": recipe.encoder.layer,
        "encoder_precision": recipe.tokenizer.encoder_precision,
    }


def context_of(seed: int, train: Train) -> Context:
    """Where a planned task runs: one worker, tensors of the CPU."""
    return Context(torch.device("cpu"), Collectives(), seed, train)


def encoder_model(recipe: Recipe) -> Model:
    """The SigLIP that a recipe trains."""
    section = recipe.encoder.train
    size = recipe.corpus.image_size
    assert section is not None
    task = EncoderTask("", [], [MANY], section, size, recipe.corpus.max_pixels, "")
    with torch.device("meta"):
        task.build(context_of(recipe.seed, section.train), section.text_vocab_size, 0, 1)
    key = "encoder.train.train"
    return Model("encoder", key, "SigLIP, vision and text", section.train, task, pixels=size)


def semantic_model(recipe: Recipe, *, gpu: bool) -> Model:
    """SemHiTok's phase `semantic`.

    Args:
        gpu: plan for GPUs, where the frozen encoder may compute in bf16.
    """
    stage = recipe.tokenizer.semantic
    encoder, origin = encoder_of(recipe)
    task = SemanticTask(
        stage,
        recipe.codebook.size,
        encoder.grid,
        encoder.dim,
        "",
        **images_of(recipe, encoder.image_size),
    )
    what = "semantic codebook on the frozen encoder"
    _build(recipe, stage.train, task, encoder, gpu)
    key = "tokenizer.semantic.train"
    return Model("semantic", key, what, stage.train, task, origin, pixels=encoder.image_size)


def pixel_model(recipe: Recipe, *, decoder: bool, gpu: bool) -> Model:
    """SemHiTok's phase `pixel`, or with `decoder` the phase `decoder`."""
    section = recipe.tokenizer
    stage = section.decoder if decoder else section.pixel
    assert stage is not None
    encoder, origin = encoder_of(recipe)
    codes = recipe.codebook.size
    semantic = (section.semantic, codes, encoder.dim, "") if section.guidance else None
    task = PixelTask(
        section.pixel,
        stage.loss,
        encoder.grid,
        codes * section.pixel.codes,
        semantic,
        decoder=stage.decoder if decoder else None,
        **images_of(recipe, encoder.image_size),
    )
    uses_encoder = section.guidance or stage.loss.perceptual.kind == "encoder"
    _build(recipe, stage.train, task, encoder if uses_encoder else None, gpu)
    name = "decoder" if decoder else "pixel"
    what = "pixel encoder, sub-codebooks and decoder"
    if decoder:
        what = "larger pixel decoder, all else frozen"
    return Model(
        name,
        f"tokenizer.{name}.train",
        what,
        stage.train,
        task,
        origin if uses_encoder else "",
        pixels=encoder.image_size,
    )


def dual_model(recipe: Recipe, *, gpu: bool) -> Model:
    """DualToken's phase `dual`: the trained tower and its frozen copy."""
    stage = recipe.tokenizer.dual
    encoder, origin = encoder_of(recipe)
    task = DualTask(stage, stage.loss, **images_of(recipe, encoder.image_size))
    _build(recipe, stage.train, task, encoder, gpu)
    what = "trained tower, its frozen copy, two codebooks and the decoder"
    key = "tokenizer.dual.train"
    return Model("dual", key, what, stage.train, task, origin, pixels=encoder.image_size)


def bridge_model(recipe: Recipe, encoder: VisionEncoder) -> Model:
    """UniCode²'s bridge beside the text encoders of its diffusion decoder."""
    section = recipe.bridge
    tokens = encoder.grid[0] * encoder.grid[1]
    assert section is not None
    text = PromptSide.from_pretrained(section.decoder, meta=True)
    task = BridgeTask(section, "", [], [MANY], tokens, "")
    meta = torch.device("meta")
    with meta:
        codes_VC = torch.empty(recipe.codebook.size, encoder.dim)
        task.build(context_of(recipe.seed, section.train), codes_VC, text, meta)
    what = "codes to a diffusion decoder's conditioning"
    origin = f"{section.decoder}: its text encoders' own configs"
    return Model("bridge", "bridge.train", what, section.train, task, origin)


def _build(
    recipe: Recipe, train: Train, task: ImageTask, encoder: VisionEncoder | None, gpu: bool
) -> None:
    if encoder is not None:
        encoder.bf16 = encodes_in_bf16(recipe.tokenizer.encoder_precision, train, gpu)
    with torch.device("meta"):
        task.build(context_of(recipe.seed, train), encoder, load=False)
