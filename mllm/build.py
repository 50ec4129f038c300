"""Build a unified model from a recipe's `mllm` section; save it to a folder and load it.

The folder holds the language model's `config.json` and `generation_config.json`, the extended
Hugging Face tokenizer, `unified.safetensors` (language model without visual embedding rows,
adapter, code vectors) and `unified.json` (how they fit together). It holds what further training
needs; for use, load the export.

Axes: M sample vectors, C width of a code vector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from smalti.errors import ArtifactError, ConfigError, TrainingError
from smalti.mllm.adapters import ADAPTERS, Adapter
from smalti.mllm.base_lm import SMALL_HEAD_GAIN, load_language_model
from smalti.mllm.depth import DepthModel
from smalti.mllm.language_model import fit_shapes, input_embedding
from smalti.mllm.lora import add_lora
from smalti.mllm.model import ModelSettings, UnifiedModel
from smalti.mllm.row_lr_scaling import scale_old_rows_lr
from smalti.mllm.rows import Matrices, WholeMatrices
from smalti.mllm.visual_tokenizer import VisualTokenizer
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import DepthHeads, MllmSection

FORMAT = 1
WEIGHTS = "unified.safetensors"
SETTINGS = "unified.json"
_CODES = "code_vectors"


def build_unified(
    section: MllmSection,
    hf_tokenizer: PreTrainedTokenizerBase,
    visual_tokenizer: VisualTokenizer,
    *,
    seed: int = 0,
    matrices: Matrices = WholeMatrices(),  # noqa: B008 (has no state)
    sample_MC: Tensor | None = None,
) -> UnifiedModel:
    """Build a unified model in float32 on the CPU.

    Its language model comes from `section.pretrained`, or from the numbers of `section.config`. The
    same seed gives the same weights; the caller's random state is not changed.

    Args:
        section: the recipe's `mllm` section.
        hf_tokenizer: extended in place (`VisualVocabulary.extend`).
        visual_tokenizer: the tokenizer of the token shards.
        seed: of the new weights.
        matrices: how embedding and head are stored.
        sample_MC: vectors of real tokens to fit the adapter of a `DepthModel` to.

    Returns:
        The model; a `DepthModel` if the tokenizer gives several codes per token.

    Raises:
        ConfigError: if the section does not fit the language model or this machine.
    """
    codes_VC = visual_tokenizer.code_vectors()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(section, hf_tokenizer, visual_tokenizer, codes_VC, seed, matrices)
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


def _new_model(
    section: MllmSection,
    hf_tokenizer: PreTrainedTokenizerBase,
    visual_tokenizer: VisualTokenizer,
    codes_VC: Tensor,
    seed: int,
    matrices: Matrices,
) -> UnifiedModel:
    causal_lm = load_language_model(section, hf_tokenizer)
    code_shape = visual_tokenizer.code_shape
    num_visual = 1 if code_shape else visual_tokenizer.num_codes
    vocabulary = VisualVocabulary.extend(hf_tokenizer, num_visual)
    width = input_embedding(causal_lm).embedding_dim
    adapter = ADAPTERS[section.adapter](
        visual_tokenizer.embed_splits, section.adapter_hidden or width, width
    )
    settings: ModelSettings = {
        "image_loss_weight": section.image_loss_weight,
        "answer_loss_weight": section.answer_loss_weight,
        "loss_chunk": section.loss_chunk,
        "seed": seed,
        "matrices": matrices,
    }
    if not code_shape:
        return UnifiedModel(causal_lm, adapter, codes_VC, vocabulary, **settings)
    return DepthModel(
        causal_lm,
        adapter,
        codes_VC,
        vocabulary,
        size=section.depth_heads,
        depth=code_shape[-1],
        **settings,
    )


def use_flash_attention(model: UnifiedModel) -> None:
    """Switch the language model to flash-attention.

    Raises:
        ConfigError: if it is not installed, or if there is no GPU.
    """
    try:
        model.lm.set_attn_implementation("flash_attention_2")
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"mllm.attention=flash is not available here: {str(error).splitlines()[0]} Install "
            "flash-attn on a machine with a GPU, or set mllm.attention=sdpa."
        ) from error
    model.one_row = True


def save_unified(
    path: str,
    model: UnifiedModel,
    hf_tokenizer: PreTrainedTokenizerBase,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a unified model into a local folder.

    The settings file is written last: a folder without it is incomplete.

    Args:
        path: created if missing.
        model: the model.
        hf_tokenizer: its tokenizer.
        state: the whole state dict, if the model itself holds only a part of it (ZeRO-3).

    Raises:
        TrainingError: if weights are missing from `state`.
    """
    os.makedirs(path, exist_ok=True)
    expected = model.state_dict()
    state = expected if state is None else state
    missing = sorted(set(expected) - set(state))
    if missing:
        raise TrainingError(
            f"{len(missing)} weights of the trained model are missing, such as {missing[0]}; "
            "nothing was saved."
        )
    tensors = {name: state[name].detach().cpu().contiguous() for name in expected}
    if not model.adapter.own_codes:
        tensors[_CODES] = model.code_vectors_VC.detach().float().cpu().contiguous()
    model.lm.config.save_pretrained(path)
    model.lm.generation_config.save_pretrained(path)
    hf_tokenizer.save_pretrained(path)
    save_file(tensors, os.path.join(path, WEIGHTS), metadata={"format": "pt"})
    settings: dict[str, object] = {
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


def load_unified(path: str) -> tuple[UnifiedModel, PreTrainedTokenizerBase]:
    """Load a unified model and its tokenizer, on the CPU, in the saved dtype.

    Args:
        path: a local folder that `save_unified` wrote.

    Raises:
        ArtifactError: if the folder is incomplete, of another format, or inconsistent.
    """
    settings = _read_settings(path)
    hf_tokenizer = AutoTokenizer.from_pretrained(path)
    vocabulary = VisualVocabulary.from_tokenizer(hf_tokenizer)
    tensors = _read_tensors(os.path.join(path, WEIGHTS))
    with no_init_weights():
        causal_lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    causal_lm.generation_config = GenerationConfig.from_pretrained(path)
    fit_shapes(causal_lm, vocabulary)
    adapter = ADAPTERS[settings["adapter"]](
        settings["splits"], settings["adapter_hidden"], input_embedding(causal_lm).embedding_dim
    )
    if adapter.own_codes:
        codes_VC = torch.empty(vocabulary.num_codes, 0)
    else:
        codes_VC = tensors.pop(_CODES)
    model = _on_meta(settings, causal_lm, adapter, codes_VC, vocabulary)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}/{WEIGHTS} does not fit its config.json: {error}. Train the model again."
        ) from error
    return model.eval(), hf_tokenizer


def _on_meta(
    settings: Mapping[str, Any],
    causal_lm: PreTrainedModel,
    adapter: Adapter,
    codes_VC: Tensor,
    vocabulary: VisualVocabulary,
) -> UnifiedModel:
    """The model of a folder; modules that are still missing are created on meta."""
    more: ModelSettings = {
        "image_loss_weight": settings["image_loss_weight"],
        "answer_loss_weight": settings["answer_loss_weight"],
        "loss_chunk": settings["loss_chunk"],
    }
    with torch.device("meta"):
        if "depth" not in settings:
            return UnifiedModel(causal_lm, adapter, codes_VC, vocabulary, **more)
        size = DepthHeads.model_validate(settings["depth"]["size"])
        depth = int(settings["depth"]["depth"])
        return DepthModel(causal_lm, adapter, codes_VC, vocabulary, size=size, depth=depth, **more)


def _read_settings(path: str) -> dict[str, Any]:
    file = os.path.join(path, SETTINGS)
    try:
        with open(file, encoding="utf-8") as stream:
            settings = json.load(stream)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} holds no complete unified model ({error}). Run `smalti mllm RECIPE` first."
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
    except Exception as error:  # safetensors raises its own class, which is not an OSError
        raise ArtifactError(
            f"{file} is missing or torn ({error}). Train the model again."
        ) from error
