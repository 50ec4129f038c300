"""DualToken's trained stages on the meta device: the tower with its frozen copy, and the language
model of places.

Axis letters: B samples, N patches, L positions, R depth, C tower width, W width of a code, H width
of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smalti.mllm.adapters import ADAPTERS
from smalti.mllm.depth import DepthModel
from smalti.mllm.lora import add_lora
from smalti.mllm.packing import visible_mask
from smalti.schema import Recipe
from smalti.tokenizers.dualtoken import BOOKS, DualModel
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.losses import PixelLoss, discriminator_loss
from smalti.tokenizers.patchgan import PatchGAN
from smalti.workflows.plan.models import (
    Autocast,
    Head,
    Model,
    encoder_of,
    language_of,
    perceptual_of,
)
from smalti.workflows.plan.trace import Backward, fake
from smalti.workflows.train.tasks.semantic import encodes_in_bf16


def dual_model(recipe: Recipe, encoder: VisionEncoder, origin: str, gpu: bool) -> Model:
    """The phase `dual`: `encoder` as it was, and the tower that trains."""
    stage = recipe.tokenizer.dual
    loss, size = stage.loss, encoder.image_size
    trained, _ = encoder_of(recipe)
    low = encodes_in_bf16(recipe.tokenizer.encoder_precision, stage.train, gpu)
    with torch.device("meta"):
        model = DualModel(stage, trained)
        criterion = PixelLoss(loss, perceptual_of(loss, encoder))
        critic = PatchGAN(loss.gan.channels, loss.gan.layers) if loss.gan.weight else None
    for quantizer in (model.pixel, model.semantic):
        quantizer.eval()  # statistics of the codes are left out: K · width numbers, and the residuals
    modules = nn.ModuleDict({"model": model.to("meta"), "criterion": criterion, "encoder": encoder})
    engines = {"model": stage.train.zero_stage}
    if critic is not None:
        modules["discriminator"], engines = critic, engines | {"discriminator": 0}

    def step(num: int, backward: Backward, autocast: Autocast) -> None:
        pixels_BCHW = fake(num, 3, size, size)
        encoder.bf16 = low
        with torch.no_grad():
            target_BNC = encoder(pixels_BCHW)
        with autocast():
            out = model(pixels_BCHW, target_BNC)
        total, _ = criterion(
            out.pixels,
            pixels_BCHW,
            discriminator=critic,
            last_layer=model.last_layer,
            step=loss.gan.start_step,
        )
        backward(total + out.semantic + out.commitment)
        if critic is not None:
            with autocast():
                critic_loss, _ = discriminator_loss(critic, out.pixels.detach(), pixels_BCHW)
            backward(critic_loss)

    return Model(
        "dual", "tokenizer.dual.train", "trained tower, its frozen copy, two codebooks and the decoder", stage.train,
        modules, engines, step, origin, pixels=size,
    )  # fmt: skip


def places_model(recipe: Recipe) -> Model:
    """The language model over places, with its depth heads."""
    section, dual = recipe.mllm, recipe.tokenizer.dual
    lm, vocabulary, origin = language_of(section, 1)
    with torch.device("meta"):
        width = lm.get_input_embeddings().embedding_dim
        adapter = ADAPTERS[section.adapter](
            (dual.dim,) * len(BOOKS), section.adapter_hidden or width, width
        )
        codes_PKW = torch.empty(len(BOOKS), dual.codes, dual.dim)
        model = DepthModel(
            lm, adapter, codes_PKW, vocabulary, size=section.depth_heads, depth=dual.depth
        )
        if section.lora:
            add_lora(model, section.lora)
    model.freeze(section.freeze)
    length = section.max_length

    def step(num: int, backward: Backward, autocast: Autocast) -> None:
        """All but the classifiers, whose loss `Head` counts; each position a place, the most that
        can be.
        """
        ids_BL = fake(num, length, dtype=torch.int64)
        with autocast():
            codes_NPR = fake(num * length, len(BOOKS), dual.depth, dtype=torch.int64)
            sums_NPRW = model.sums(codes_NPR)
            embeds_BLH = lm.get_input_embeddings()(ids_BL)
            vectors_BLH = adapter(sums_NPRW[:, :, -1].reshape(num, length, -1)).to(embeds_BLH.dtype)
            embeds_BLH = torch.where(
                fake(num, length, 1, dtype=torch.bool), vectors_BLH, embeds_BLH
            )
            mask = visible_mask(ids_BL, ids_BL, embeds_BLH.dtype)
            hidden_BLH = model.backbone(
                inputs_embeds=embeds_BLH, attention_mask=mask, position_ids=ids_BL, use_cache=False
            ).last_hidden_state
            hidden_NH = hidden_BLH.flatten(0, 1)
            heads: list[Any] = list(model.heads.values())
            outs = [head.outputs(hidden_NH, sums_NPRW[:, p, :-1]) for p, head in enumerate(heads)]
        backward(hidden_NH.float().sum() + sum(out.sum(dtype=torch.float32) for out in outs))

    head = lm.get_output_embeddings()
    many = len(BOOKS) * dual.depth
    what = f"language model over {head.out_features:,} tokens, {many} classifiers of {dual.codes:,} codes"
    return Model(
        "mllm", "mllm.train", what, section.train, nn.ModuleDict({"model": model}), {"model": section.train.zero_stage},
        step, origin,
        Head(head.out_features, width, length, section.loss_chunk, head.weight.requires_grad, many, dual.codes),
        section.packing,
    )  # fmt: skip
