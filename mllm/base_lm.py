"""The causal language model and text tokenizer that a recipe starts from.

They are loaded from a folder or hub name, or the model is built from a few numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from smalti.errors import ConfigError
from smalti.mllm.language_model import input_embedding
from smalti.schema import LanguageModel, MllmSection
from smalti.tokenizers.encoders import quiet

SMALL_EMBEDDING_GAIN, SMALL_BLOCK_GAIN, SMALL_HEAD_GAIN = 10.0, 0.1, 3.0
"""Initial scales of a model from numbers, on top of `initializer_range`.

See `_from_numbers` and `UnifiedModel.start_visual`.
"""
UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)
"""What transformers raises for a folder without a complete model."""


def load_language_model(
    section: MllmSection, hf_tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The language model of a recipe, in float32, before any visual token.

    Args:
        section: sets `pretrained` or `config`.
        hf_tokenizer: the text tokenizer; it sets the vocabulary of a model from `config`.

    Raises:
        ConfigError: if both or neither are set, or if the model does not load or lacks weights.
    """
    if section.pretrained and section.config:
        raise ConfigError("mllm.pretrained and mllm.config are both set; keep one.")
    if section.config:
        return _from_numbers(qwen2_config(section.config, section.max_length, hf_tokenizer))
    if not section.pretrained:
        raise ConfigError(
            "Neither mllm.pretrained nor mllm.config is set: give a folder or hub name, or the "
            "sizes of a model."
        )
    try:
        causal_lm, missing = load_causal_lm(section.pretrained, dtype=torch.float32)
    except UNREADABLE as error:
        raise ConfigError(
            f"mllm.pretrained={section.pretrained!r} could not be loaded as a causal language "
            f"model: {error}"
        ) from error
    if missing:
        raise ConfigError(
            f"mllm.pretrained={section.pretrained!r} lacks {len(missing)} weights of "
            f"{type(causal_lm).__name__}, the first {missing[0]}; expected a complete causal "
            "language model. Copy it again."
        )
    return causal_lm


def load_causal_lm(path_or_name: str, **options: object) -> tuple[PreTrainedModel, list[str]]:
    """Load a causal language model from a folder or hub name.

    Args:
        path_or_name: a local folder, or a name on the hub.
        options: of `from_pretrained`, such as `dtype`.

    Returns:
        The model, and the names of the weights that its files lack.

    Raises:
        UNREADABLE: if there is no complete model.
    """
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_name, output_loading_info=True, **options
        )
    causal_lm, report = loaded  # annotated as a model only
    return causal_lm, sorted(report["missing_keys"])


def load_text_tokenizer(pretrained: str) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer of `mllm.pretrained`.

    Raises:
        ConfigError: if it does not load.
    """
    try:
        return AutoTokenizer.from_pretrained(pretrained)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"mllm.pretrained={pretrained!r} has no tokenizer that loads: {error}"
        ) from error


def _from_numbers(config: Qwen2Config) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights that at first passes a token on almost unchanged.

    Its embeddings are wide, and its blocks add little to them. With a head that starts like the
    embedding, the model repeats a code from the first step (most patches of a plain ground repeat
    their neighbour) and need not learn that code by code.
    """
    causal_lm = Qwen2ForCausalLM(config)
    with torch.no_grad():
        input_embedding(causal_lm).weight.mul_(SMALL_EMBEDDING_GAIN)
        for name, parameter in causal_lm.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(SMALL_BLOCK_GAIN)
    return causal_lm


def qwen2_config(size: LanguageModel, max_length: int, hf_tokenizer: Any) -> Qwen2Config:
    """The configuration of a Qwen2 from a recipe's numbers.

    Args:
        size: `mllm.config`.
        max_length: most tokens of a sequence.
        hf_tokenizer: has a length, and ids of special tokens.

    Raises:
        ConfigError: if the sizes do not divide each other.
    """
    if size.hidden_size % size.heads or size.heads % size.kv_heads:
        raise ConfigError(
            f"mllm.config: hidden_size {size.hidden_size} must be a multiple of heads "
            f"{size.heads}, and heads of kv_heads {size.kv_heads}."
        )
    return Qwen2Config(
        vocab_size=len(hf_tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=max_length,
        # outputs of unit scale; 0.02 is meant for widths of thousands. In an experiment with one
        # seed, the question-only plateau ended about 100 steps sooner than with 0.02
        initializer_range=size.hidden_size**-0.5,
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=hf_tokenizer.bos_token_id,
        eos_token_id=hf_tokenizer.eos_token_id,
        pad_token_id=hf_tokenizer.pad_token_id,
    )
