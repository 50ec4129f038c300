"""The language models' training task, built on the meta device for the planner.

Axis letters: P codebooks, K codes, W width of a code, V visual codes, C width of a code vector.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from smalti.mllm.adapters import ADAPTERS, Adapter, fitting
from smalti.mllm.base_lm import qwen2_config
from smalti.mllm.depth import DepthModel
from smalti.mllm.language_model import fit_shapes
from smalti.mllm.lora import add_lora
from smalti.mllm.model import UnifiedModel
from smalti.mllm.vocabulary import DELIMITERS, VisualVocabulary
from smalti.schema import MllmSection, Recipe
from smalti.tokenizers.dualtoken import BOOKS
from smalti.workflows.plan.configs import language_config
from smalti.workflows.plan.image_tasks import MANY, context_of
from smalti.workflows.plan.models import Head, Model
from smalti.workflows.train.tasks.mllm import MllmTask


class _Tokens:
    """What the sizes of a Qwen2 need of its text tokenizer."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def language_of(section: MllmSection, num_codes: int) -> tuple[Any, VisualVocabulary, str]:
    """A language model on meta with the matrices of its vocabulary.

    Returns:
        The Hugging Face model, its vocabulary, and where its sizes come from.
    """
    if section.config is not None:
        tokens = section.config.text_vocab_size
        origin = ""
        config: PreTrainedConfig = qwen2_config(section.config, section.max_length, _Tokens(tokens))
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
    """The language model over visual codes.

    Args:
        num_codes: codes of the visual tokenizer.
        splits: widths of the parts of a code's vector.
    """
    lm, vocabulary, origin = language_of(section, num_codes)
    with torch.device("meta"):
        adapter = _adapter(section, lm, splits)
        codes_VC = torch.empty(num_codes, sum(splits))
        model = UnifiedModel(lm, adapter, codes_VC, vocabulary, loss_chunk=section.loss_chunk)
    head = lm.get_output_embeddings()
    return _planned(section, model, origin, f"language model over {head.out_features:,} tokens")


def places_model(recipe: Recipe) -> Model:
    """DualToken's language model over places of several codes, with its depth heads."""
    section = recipe.mllm
    dual = recipe.tokenizer.dual
    lm, vocabulary, origin = language_of(section, 1)
    with torch.device("meta"):
        model = DepthModel(
            lm,
            _adapter(section, lm, (dual.dim,) * len(BOOKS)),
            torch.empty(len(BOOKS), dual.codes, dual.dim),
            vocabulary,
            size=section.depth_heads,
            depth=dual.depth,
            loss_chunk=section.loss_chunk,
        )
    rows = lm.get_output_embeddings().out_features
    classifiers = f"{len(BOOKS) * dual.depth} classifiers of {dual.codes:,} codes"
    return _planned(section, model, origin, f"language model over {rows:,} tokens, {classifiers}")


def _adapter(section: MllmSection, lm: Any, splits: tuple[int, ...]) -> Adapter:
    width = lm.get_input_embeddings().embedding_dim
    kind = ADAPTERS[fitting(section.adapter, splits)]
    return kind(splits, section.adapter_hidden or width, width)


def _planned(section: MllmSection, model: UnifiedModel, origin: str, what: str) -> Model:
    """The stage that trains this language model."""
    if section.lora:
        with torch.device("meta"):
            add_lora(model, section.lora)
    task = MllmTask(section, "", "", [], [MANY], "")
    task.build(context_of(0, section.train), model)
    matrix = model.lm.get_output_embeddings()
    head = Head(
        matrix.out_features,
        matrix.in_features,
        section.max_length,
        section.loss_chunk,
        matrix.weight.requires_grad,
    )
    if isinstance(model, DepthModel):
        head = replace(head, depths=len(model.heads) * model.depth, codes=model.num_codes)
    return Model("mllm", "mllm.train", what, section.train, task, origin, head, section.packing)
