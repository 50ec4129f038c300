"""The models that a recipe trains, on the meta device, each with one micro batch of its step for
`trace`.

Axis letters: B samples, N patches, L positions, C feature width, V head rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, SiglipVisionModel

from smalti.mllm.adapters import ADAPTERS, fitting
from smalti.mllm.base_lm import qwen2_config
from smalti.mllm.bridge import Bridge, BridgeLoss
from smalti.mllm.diffusion import PromptSide
from smalti.mllm.language_model import fit_shapes
from smalti.mllm.lora import add_lora
from smalti.mllm.model import UnifiedModel
from smalti.mllm.packing import visible_mask
from smalti.mllm.vocabulary import DELIMITERS, VisualVocabulary
from smalti.schema import Loss, MllmSection, Recipe, Train
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.losses import PixelLoss, build_perceptual, discriminator_loss, distill_loss
from smalti.tokenizers.lpips import LPIPS
from smalti.tokenizers.patchgan import PatchGAN
from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer
from smalti.tokenizers.siglip import ContrastiveModel, build_siglip, siglip_loss
from smalti.workflows.plan.configs import language_config, vision_config
from smalti.workflows.plan.trace import Backward, fake
from smalti.workflows.train.engines import SENT_LOW
from smalti.workflows.train.optimizers import hidden_matrices
from smalti.workflows.train.tasks.semantic import encodes_in_bf16

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Head:
    """An output head whose loss is made in chunks of positions: rows, width, positions of a sample,
    chunk; `trained`: whether its weight is.

    `depths` classifiers of `codes` rows each stand beside it for visual places, one after the
    other.
    """

    rows: int
    width: int
    length: int
    chunk: int
    trained: bool = True
    depths: int = 0
    codes: int = 0

    @property
    def every(self) -> int:
        """Rows of all matrices."""
        return self.rows + self.depths * self.codes

    @property
    def passed(self) -> int:
        """Rows that a position passes at most: those for text, or those for a place."""
        return max(self.rows, self.depths * self.codes)

    @property
    def at_once(self) -> int:
        """Rows of the largest matrix."""
        return max(self.rows, self.codes)


@dataclass(frozen=True)
class Model:
    """One trained stage.

    `modules` holds everything on the GPU, `engines` names what is trained and its ZeRO stage;
    `step(num, backward, autocast)` is a micro batch of `num` samples. `packed`: several samples
    share a row of the longest length.
    """

    name: str
    section: str
    what: str
    train: Train
    modules: nn.ModuleDict
    engines: dict[str, int]
    step: Callable[[int, Backward, Autocast], None]
    origin: str = ""
    head: Head | None = None
    packed: bool = False
    pixels: int = 0
    parts: dict[str, float] = field(default_factory=dict)

    def parameters(self, engine: str | None = None) -> int:
        """Parameters of an engine that are trained; without a name all that lie on the GPU (frozen
        ones too).
        """
        if engine is None:
            return sum(p.numel() for p in self.modules.parameters())
        return sum(p.numel() for p in self.modules[engine].parameters() if p.requires_grad)

    def resting(self, engine: str) -> int:
        """Parameters of an engine that are not trained: `mllm.freeze`, or what low-rank updates
        stand beside.
        """
        return sum(p.numel() for p in self.modules[engine].parameters() if not p.requires_grad)

    def low(self, engine: str, *, trained: bool) -> int:
        """Of an engine's trained parameters, or of the others, those that are sent in bf16
        (`engines.SENT_LOW`).
        """
        if self.train.precision != "bf16":
            return 0
        layers = [module for module in self.modules[engine].modules() if type(module) in SENT_LOW]
        own = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
        return sum(p.numel() for p in own.values() if p.requires_grad == trained)

    def muon(self, engine: str) -> int:
        """Parameters with one moment instead of AdamW's two."""
        if self.train.optimizer != "muon":
            return 0
        return sum(weight.numel() for weight in hidden_matrices(self.modules[engine]))

    @property
    def frozen(self) -> int:
        """Parameters outside the engines, which are not trained, and numbers in buffers: whole on
        every GPU.
        """
        inside = sum(self.parameters(engine) + self.resting(engine) for engine in self.engines)
        return self.parameters() - inside + sum(b.numel() for b in self.modules.buffers())

    @property
    def largest(self) -> int:
        """Parameters of the largest single module, which ZeRO-3 gathers whole."""
        own = (
            sum(p.numel() for p in m.parameters(recurse=False))
            for m in self.modules["model"].modules()
        )
        return max(own)


def encoder_of(recipe: Recipe) -> tuple[VisionEncoder, str]:
    """The frozen encoder on the meta device, and where its sizes come from."""
    section = recipe.encoder
    with torch.device("meta"):
        if section.train is not None:
            size = recipe.corpus.image_size
            siglip = build_siglip(section.train, size, section.train.text_vocab_size, 0, 1)
            own: Any = siglip.config.vision_config
            return VisionEncoder(SiglipVisionModel(own), section.layer), ""
        config, origin = vision_config(section.pretrained or "")
        return VisionEncoder(SiglipVisionModel(config), section.layer), origin


def _pixels_of(num: int, size: int) -> torch.Tensor:
    return fake(num, 3, size, size)


def encoder_model(recipe: Recipe) -> Model:
    section = recipe.encoder.train
    assert section is not None
    size = recipe.corpus.image_size
    with torch.device("meta"):
        model = ContrastiveModel(build_siglip(section, size, section.text_vocab_size, 0, 1))

    def step(num: int, backward: Backward, autocast: Autocast) -> None:
        ids_BL = fake(
            num, section.text_length, dtype=torch.int64
        )  # all texts differ: the most that can be
        with autocast():
            images = model.model.vision_model(pixel_values=_pixels_of(num, size)).pooler_output
            texts = model.model.text_model(input_ids=ids_BL).pooler_output
            images_BE, texts_BE = (
                F.normalize(images.float(), dim=-1),
                F.normalize(texts.float(), dim=-1),
            )
            same = fake(num, num, dtype=torch.bool)
            loss = siglip_loss(
                images_BE, texts_BE, model.model.logit_scale, model.model.logit_bias, same
            )
        backward(loss)

    return Model(
        "encoder", "encoder.train.train", "SigLIP, vision and text", section.train, nn.ModuleDict({"model": model}),
        {"model": section.train.zero_stage}, step, pixels=size,
    )  # fmt: skip


def semantic_model(recipe: Recipe, encoder: VisionEncoder, origin: str, gpu: bool) -> Model:
    stage = recipe.tokenizer.semantic
    low = encodes_in_bf16(recipe.tokenizer.encoder_precision, stage.train, gpu)
    with torch.device("meta"):
        model = SemanticTokenizer(encoder.dim, stage, recipe.codebook.size, encoder.grid)
    model.quantizer.eval()  # statistics of the codes are left out: K · width numbers

    def step(num: int, backward: Backward, autocast: Autocast) -> None:
        encoder.bf16 = low
        with torch.no_grad():
            features_BNC = encoder(_pixels_of(num, encoder.image_size))
        with autocast():
            quantized = model.quantizer(model.project(features_BNC))
            loss = (
                distill_loss(model.reconstruct(quantized.q), features_BNC, stage.distill)
                + quantized.loss
            )
        backward(loss)

    modules = nn.ModuleDict({"model": model, "encoder": encoder})
    return Model(
        "semantic", "tokenizer.semantic.train", "semantic codebook on the frozen encoder", stage.train, modules,
        {"model": stage.train.zero_stage}, step, origin, pixels=encoder.image_size,
    )  # fmt: skip


def pixel_model(
    recipe: Recipe, encoder: VisionEncoder, origin: str, gpu: bool, *, decoder: bool
) -> Model:
    """Stage P, or stage D with `decoder`."""
    section, size = recipe.tokenizer, encoder.image_size
    stage = section.decoder if decoder else section.pixel
    assert stage is not None
    guided, loss = section.guidance, stage.loss
    low = encodes_in_bf16(section.encoder_precision, stage.train, gpu)
    codes = torch.ones(recipe.codebook.size, section.semantic.dim) if guided else None
    with torch.device("meta"):
        model = PixelTokenizer(
            section.pixel, codes, size, encoder.grid, recipe.codebook.size * section.pixel.codes
        )  # fmt: skip
        if decoder:
            model.replace_decoder(stage.decoder)
        perceptual = perceptual_of(loss, encoder)
        criterion = PixelLoss(loss, perceptual)
        critic = PatchGAN(loss.gan.channels, loss.gan.layers) if loss.gan.weight else None
    modules = nn.ModuleDict({"model": model.to("meta"), "criterion": criterion})
    uses_encoder = guided or loss.perceptual.kind == "encoder"
    if guided:
        with torch.device("meta"):
            modules["semantic"] = SemanticTokenizer(
                encoder.dim, section.semantic, recipe.codebook.size, encoder.grid
            )
        modules["semantic"].eval().requires_grad_(False)
    if uses_encoder:
        modules["encoder"] = encoder
    engines = {"model": stage.train.zero_stage}
    if critic is not None:
        modules["discriminator"], engines = critic, engines | {"discriminator": 0}

    def step(num: int, backward: Backward, autocast: Autocast) -> None:
        pixels_BCHW, ids_BN = _pixels_of(num, size), None
        encoder.bf16 = low
        if guided:
            with torch.no_grad():
                ids_BN = modules["semantic"].encode(encoder(pixels_BCHW))  # type: ignore[operator]
        with autocast():
            out = model(pixels_BCHW, ids_BN)
        total, _ = criterion(
            out.pixels,
            pixels_BCHW,
            discriminator=critic,
            last_layer=model.last_layer,
            step=loss.gan.start_step,
        )
        if not decoder:
            total = total + section.pixel.vq_weight * out.vq_loss
        if out.semantic_only is not None and not decoder:
            total = total + criterion(out.semantic_only, pixels_BCHW)[0]
        backward(total)
        if critic is not None:
            with autocast():
                critic_loss, _ = discriminator_loss(critic, out.pixels.detach(), pixels_BCHW)
            backward(critic_loss)

    what = (
        "larger pixel decoder, all else frozen"
        if decoder
        else "pixel encoder, sub-codebooks and decoder"
    )
    name = "decoder" if decoder else "pixel"
    return Model(
        name, f"tokenizer.{name}.train", what, stage.train, modules, engines, step,
        origin if uses_encoder else "", pixels=size,
    )  # fmt: skip


def perceptual_of(loss: Loss, encoder: VisionEncoder) -> nn.Module | None:
    wanted = loss.perceptual.kind == "lpips" and loss.perceptual.weight > 0
    return LPIPS() if wanted else build_perceptual(loss, encoder)


class _Tokens:
    """What the sizes of a Qwen2 need of its text tokenizer."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def language_of(section: MllmSection, num_codes: int) -> tuple[Any, VisualVocabulary, str]:
    """(language model on meta with the matrices of its vocabulary, that vocabulary, where its sizes
    come from).
    """
    if section.config is not None:
        tokens, origin = section.config.text_vocab_size, ""
        config: Any = qwen2_config(section.config, section.max_length, _Tokens(tokens))
    else:
        config, tokens, origin = language_config(section.pretrained or "")
    first = tokens + len(DELIMITERS)
    vocabulary = VisualVocabulary(
        tokens, first, num_codes, tokens, tokens + 1, tokens + 2, tokens + 3, 0, 0, None
    )
    with torch.device("meta"):
        lm: Any = AutoModelForCausalLM.from_config(config)
        fit_shapes(lm, vocabulary)
    return lm, vocabulary, origin


def language_model(section: MllmSection, num_codes: int, splits: tuple[int, ...]) -> Model:
    """The language model over `num_codes` visual codes, whose vectors have parts of these widths."""
    lm, vocabulary, origin = language_of(section, num_codes)
    with torch.device("meta"):
        width = lm.get_input_embeddings().embedding_dim
        kind = ADAPTERS[fitting(section.adapter, splits)]
        adapter = kind(splits, section.adapter_hidden or width, width)
        model = UnifiedModel(lm, adapter, torch.empty(num_codes, sum(splits)), vocabulary)
        if section.lora:
            add_lora(model, section.lora)
    model.freeze(section.freeze)
    length = section.max_length

    def step(num: int, backward: Backward, autocast: Autocast) -> None:
        """All but the head, whose loss `Head` counts; each position a visual token, the most that
        can be.
        """
        ids_BL = fake(num, length, dtype=torch.int64)
        with autocast():
            embeds_BLH = lm.get_input_embeddings()(ids_BL)
            vectors_BLH = model.visual_inputs(ids_BL).to(embeds_BLH.dtype)
            embeds_BLH = torch.where(
                fake(num, length, 1, dtype=torch.bool), vectors_BLH, embeds_BLH
            )
            mask = visible_mask(ids_BL, ids_BL, embeds_BLH.dtype)
            hidden = model.backbone(
                inputs_embeds=embeds_BLH, attention_mask=mask, position_ids=ids_BL, use_cache=False
            ).last_hidden_state
        backward(hidden.float().sum())

    head = lm.get_output_embeddings()
    rows = head.out_features
    return Model(
        "mllm", "mllm.train", f"language model over {rows:,} tokens", section.train, nn.ModuleDict({"model": model}),
        {"model": section.train.zero_stage}, step, origin,
        Head(rows, width, length, section.loss_chunk, head.weight.requires_grad), section.packing,
    )  # fmt: skip


def bridge_model(recipe: Recipe, encoder: VisionEncoder) -> Model:
    """UniCode²'s bridge beside the text encoders of its diffusion decoder; vectors of codes come
    with the batch.
    """
    section, tokens = recipe.bridge, encoder.grid[0] * encoder.grid[1]
    assert section is not None
    text = PromptSide.from_pretrained(section.decoder, meta=True)
    with torch.device("meta"):
        ids = {name: ids_BL.to("meta") for name, ids_BL in text.tokenize([""]).items()}
        model = BridgeLoss(Bridge(section, text(ids).shape(tokens, encoder.dim)))

    def step(num: int, backward: Backward, autocast: Autocast) -> None:
        prompts = {
            name: fake(num, ids_BL.shape[1], dtype=torch.int64) for name, ids_BL in ids.items()
        }
        wanted = text(prompts)
        with autocast():
            loss, _ = model(
                fake(num, tokens, encoder.dim), wanted, torch.cat([*prompts.values()], -1)
            )
        backward(loss)

    return Model(
        "bridge", "bridge.train", "codes to a diffusion decoder's conditioning", section.train,
        nn.ModuleDict({"model": model, "text": text}), {"model": section.train.zero_stage}, step,
        f"{section.decoder}: its text encoders' own configs",
    )  # fmt: skip
