"""A unified model from a recipe's `mllm` section, and its folder on disk.

The folder: the language model's `config.json` and `generation_config.json`, the extended Hugging
Face tokenizer, `unified.safetensors` (language model without visual embedding rows, adapter, code
vectors) and `unified.json` (how they fit together). It holds what further training needs; what
everybody else loads is the export.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.initialization import no_init_weights

from smalti.errors import ArtifactError, ConfigError, TrainingError
from smalti.mllm.adapters import ADAPTERS, Adapter
from smalti.mllm.depth import DepthModel
from smalti.mllm.lora import add_lora
from smalti.mllm.model import UnifiedModel, fit_shapes
from smalti.mllm.row_lr_scaling import scale_old_rows_lr
from smalti.mllm.rows import Matrices, WholeMatrices
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import DepthHeads, LanguageModel, MllmSection
from smalti.tokenizers.encoders import quiet

FORMAT = 1
WEIGHTS, SETTINGS = "unified.safetensors", "unified.json"
_CODES = "code_vectors"
SMALL_EMBEDDING_GAIN, SMALL_BLOCK_GAIN, SMALL_HEAD_GAIN = 10.0, 0.1, 3.0
"""Starting scales of a model from numbers, beside those of `initializer_range`: see
`_from_numbers`, `start_visual`.
"""
UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)
"""What transformers raises for a folder without a whole model."""


class VisualTokenizer(Protocol):
    """What the language model's side needs of a visual tokenizer."""

    @property
    def num_codes(self) -> int: ...

    @property
    def code_shape(self) -> tuple[int, ...]: ...

    @property
    def embed_splits(self) -> tuple[int, ...]: ...

    def code_vectors(self) -> Tensor: ...


def build_unified(
    section: MllmSection,
    hf_tokenizer: Any,
    visual_tokenizer: VisualTokenizer,
    *,
    seed: int = 0,
    matrices: Matrices = WholeMatrices(),  # noqa: B008 (has no state)
    sample_MC: Tensor | None = None,
) -> UnifiedModel:
    """A unified model in float32 on the CPU; `hf_tokenizer` is extended in place
    (`VisualVocabulary.extend`).

    A `DepthModel` where the tokenizer gives several codes a token; `sample_MC` then holds vectors
    of real tokens, for the adapter's start.

    Its language model comes from `section.pretrained` or, when that is not set, from
    `section.config`'s numbers. The same seed gives the same weights; the caller's random state is
    left alone. matrices: how embedding and head lie.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        causal_lm = load_language_model(section, hf_tokenizer)
        several = visual_tokenizer.code_shape
        vocabulary = VisualVocabulary.extend(
            hf_tokenizer, 1 if several else visual_tokenizer.num_codes
        )
        width = causal_lm.get_input_embeddings().embedding_dim
        adapter = ADAPTERS[section.adapter](
            visual_tokenizer.embed_splits, section.adapter_hidden or width, width
        )
        codes_VC = visual_tokenizer.code_vectors()
        kind = (
            partial(DepthModel, size=section.depth_heads, depth=several[-1])
            if several
            else UnifiedModel
        )
        model = kind(
            causal_lm,
            adapter,
            codes_VC,
            vocabulary,
            image_loss_weight=section.image_loss_weight,
            answer_loss_weight=section.answer_loss_weight,
            loss_chunk=section.loss_chunk,
            seed=seed,
            matrices=matrices,
        )
        if section.lora:
            add_lora(model, section.lora)
    if section.attention == "flash":
        use_flash_attention(model)
    if isinstance(model, DepthModel):
        model.start_visual(sample_MC=sample_MC)
    else:
        model.start_visual(SMALL_HEAD_GAIN if section.config else 1.0, codes_VC=codes_VC)
    if section.old_rows != 1:
        scale_old_rows_lr(model, section.old_rows)
    return model


def use_flash_attention(model: UnifiedModel) -> None:
    """Let the language model attend through flash-attention.

    ConfigError where it is not installed or there is no GPU.
    """
    try:
        model.lm.set_attn_implementation("flash_attention_2")
    except (ImportError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise ConfigError(
            f"mllm.attention=flash cannot be had here: {told} Install flash-attn on a machine with a GPU, or set "
            "mllm.attention=sdpa."
        ) from error
    model.one_row = True


def load_language_model(section: MllmSection, hf_tokenizer: Any) -> Any:
    """The Hugging Face causal language model that a recipe names or describes, in float32, before
    any visual token.
    """
    if section.pretrained and section.config:
        raise ConfigError("mllm.pretrained and mllm.config are both set; keep one.")
    if section.config:
        return _from_numbers(_qwen2_config(section.config, section.max_length, hf_tokenizer))
    if not section.pretrained:
        raise ConfigError(
            "Neither mllm.pretrained nor mllm.config is set: give a folder or hub name, or the sizes of a model."
        )
    try:
        causal_lm, missing = load_causal_lm(section.pretrained, dtype=torch.float32)
    except UNREADABLE as error:
        raise ConfigError(
            f"mllm.pretrained={section.pretrained!r} could not be loaded as a causal language model: {error}"
        ) from error
    if missing:
        raise ConfigError(
            f"mllm.pretrained={section.pretrained!r} lacks {len(missing)} weights of {type(causal_lm).__name__}, the first "
            f"{missing[0]}; expected a whole causal language model. Copy it again."
        )
    return causal_lm


def load_causal_lm(path_or_name: str, **options: Any) -> tuple[Any, list[str]]:
    """A causal language model of a folder or hub name, and the weights that it lacks.

    Errors: one of `UNREADABLE`.
    """
    kind: Any = AutoModelForCausalLM
    with quiet():
        causal_lm, report = kind.from_pretrained(path_or_name, output_loading_info=True, **options)
    return causal_lm, sorted(report["missing_keys"])


def load_text_tokenizer(pretrained: str) -> Any:
    """The Hugging Face tokenizer of `mllm.pretrained`."""
    try:
        return AutoTokenizer.from_pretrained(pretrained)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"mllm.pretrained={pretrained!r} has no tokenizer that loads: {error}"
        ) from error


def _from_numbers(config: Qwen2Config) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights in which a token is, at first, passed on nearly as it is: wide
    embeddings, and blocks that add little to them.

    With a head that starts as the embedding does, repeating a code is there from the first step
    (most patches of a plain ground repeat their neighbour) and need not be learned code by code.
    """
    causal_lm: Any = Qwen2ForCausalLM(config)
    with torch.no_grad():
        causal_lm.get_input_embeddings().weight.mul_(SMALL_EMBEDDING_GAIN)
        for name, parameter in causal_lm.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(SMALL_BLOCK_GAIN)
    return causal_lm


def _qwen2_config(size: LanguageModel, max_length: int, hf_tokenizer: Any) -> Qwen2Config:
    if size.hidden_size % size.heads or size.heads % size.kv_heads:
        raise ConfigError(
            f"mllm.config: hidden_size {size.hidden_size} must be a multiple of heads {size.heads}, and heads of kv_heads "
            f"{size.kv_heads}."
        )
    return Qwen2Config(
        vocab_size=len(hf_tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=max_length,
        initializer_range=size.hidden_size
        ** -0.5,  # outputs of unit scale; 0.02 is meant for widths of thousands.
        # In a one-seed sketch it left the question-only plateau about 100 steps sooner than with
        # 0.02
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=hf_tokenizer.bos_token_id,
        eos_token_id=hf_tokenizer.eos_token_id,
        pad_token_id=hf_tokenizer.pad_token_id,
    )


def save_unified(
    path: str, model: UnifiedModel, hf_tokenizer: Any, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a unified model into the local folder `path`.

    `state`: its whole state dict, where the model itself holds only a part (ZeRO-3). The settings
    file comes last: a folder without it is half-written.
    """
    os.makedirs(path, exist_ok=True)
    expected = model.state_dict()
    state = expected if state is None else state
    missing = sorted(set(expected) - set(state))
    if missing:
        raise TrainingError(
            f"{len(missing)} weights of the trained model are missing, such as {missing[0]}; nothing was saved."
        )
    tensors = {name: state[name].detach().cpu().contiguous() for name in expected}
    if not model.adapter.own_codes:
        tensors[_CODES] = model.code_vectors_VC.detach().float().cpu().contiguous()
    model.lm.config.save_pretrained(path)
    model.lm.generation_config.save_pretrained(path)
    hf_tokenizer.save_pretrained(path)
    save_file(tensors, os.path.join(path, WEIGHTS), metadata={"format": "pt"})
    settings: dict[str, Any] = {
        "format": FORMAT,
        "adapter": next(name for name, kind in ADAPTERS.items() if type(model.adapter) is kind),
        "splits": list(model.adapter.splits),
        "adapter_hidden": model.adapter.hidden,
        "image_loss_weight": model.image_loss_weight,
        "answer_loss_weight": model.answer_loss_weight,
        "loss_chunk": model.loss_chunk,
    }
    if isinstance(model, DepthModel):
        settings["depth"] = {"size": model.size.model_dump(mode="json"), "depth": model.depth}
    with open(os.path.join(path, SETTINGS), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2)


def load_unified(path: str) -> tuple[UnifiedModel, Any]:
    """The unified model and its tokenizer from a folder that `save_unified` wrote: on the CPU, in
    the saved dtype.
    """
    settings = _read_settings(path)
    hf_tokenizer = AutoTokenizer.from_pretrained(path)
    vocabulary = VisualVocabulary.from_tokenizer(hf_tokenizer)
    tensors = _read_tensors(os.path.join(path, WEIGHTS))
    with no_init_weights():
        causal_lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    causal_lm.generation_config = GenerationConfig.from_pretrained(path)
    fit_shapes(causal_lm, vocabulary)
    width = causal_lm.get_input_embeddings().embedding_dim
    adapter: Adapter = ADAPTERS[settings["adapter"]](
        settings["splits"], settings["adapter_hidden"], width
    )
    nothing = torch.empty(vocabulary.num_codes, 0)  # of an adapter that holds the vectors itself
    kind: Any = (
        partial(DepthModel, **depth_settings(settings["depth"]))
        if "depth" in settings
        else UnifiedModel
    )
    with torch.device("meta"):  # what is not there yet gets its weights below
        model = kind(
            causal_lm,
            adapter,
            nothing if adapter.own_codes else tensors.pop(_CODES),
            vocabulary,
            image_loss_weight=settings["image_loss_weight"],
            answer_loss_weight=settings["answer_loss_weight"],
            loss_chunk=settings["loss_chunk"],
        )
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}/{WEIGHTS} does not fit its config.json: {error}. Train the model again."
        ) from error
    return model.eval(), hf_tokenizer


def depth_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `DepthModel` that its folder keeps."""
    return {"size": DepthHeads.model_validate(saved["size"]), "depth": int(saved["depth"])}


def _read_settings(path: str) -> dict[str, Any]:
    file = os.path.join(path, SETTINGS)
    try:
        with open(file, encoding="utf-8") as stream:
            settings = json.load(stream)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} holds no whole unified model ({error}). Run `smalti mllm RECIPE` first."
        ) from error
    if settings.get("format") != FORMAT:
        raise ArtifactError(
            f"{file} has format {settings.get('format')}, but this version reads format {FORMAT}."
        )
    return settings


def _read_tensors(file: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors raises its own class, which is no OSError
        raise ArtifactError(
            f"{file} is missing or torn ({error}). Train the model again."
        ) from error
