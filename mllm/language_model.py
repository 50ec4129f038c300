"""Fit a causal language model of transformers to the flat vocabulary of a unified model.

Its embedding ends before the first visual token, its head covers all tokens and is untied.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from smalti.errors import VocabularyError
from smalti.mllm.losses import LossHead
from smalti.mllm.rows import Matrices, grow
from smalti.mllm.vocabulary import VisualVocabulary

_NEUTRAL = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
_USE = "Use a model such as Qwen2, Qwen3, Llama or Mistral."


def input_embedding(causal_lm: PreTrainedModel) -> nn.Embedding:
    """The token embedding of a supported language model."""
    embed = causal_lm.get_input_embeddings()
    assert isinstance(embed, nn.Embedding), type(embed)
    return embed


def output_head(causal_lm: PreTrainedModel) -> nn.Linear:
    """The output head of a supported language model."""
    head = causal_lm.get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    return head


def check_supported(causal_lm: PreTrainedModel) -> None:
    """Check that embedding and head are plain matrices.

    Loss, drawing and the embedding swap all depend on it.

    Raises:
        VocabularyError: if logits are not simply `head(hidden)`, or if the embedding rescales its
            rows.
    """
    name = type(causal_lm).__name__
    text_config = causal_lm.config.get_text_config()
    for key, neutral in _NEUTRAL.items():
        found = getattr(text_config, key, neutral)
        if found not in (None, neutral):
            raise VocabularyError(
                f"{name} has {key}={found}: its logits are not a plain linear head, which this "
                f"project does not support. {_USE}"
            )
    embed = causal_lm.get_input_embeddings()
    head = causal_lm.get_output_embeddings()
    if not isinstance(embed, nn.Embedding) or not isinstance(head, nn.Linear):
        raise VocabularyError(
            f"{name} has no plain token embedding and linear head ({type(embed).__name__}, "
            f"{type(head).__name__}). {_USE}"
        )
    if _rescales(embed):
        raise VocabularyError(
            f"{name} rescales its embedding rows, which the embedding swap cannot undo. {_USE}"
        )


@torch.no_grad()
def _rescales(embed: nn.Embedding) -> bool:
    if embed.weight.device.type == "meta" or not embed.weight.numel():
        return False  # without storage, or partitioned: cannot be probed
    probe = torch.zeros(1, dtype=torch.int64, device=embed.weight.device)
    return not torch.equal(embed(probe), embed.weight[:1])


def fit_vocabulary(
    causal_lm: PreTrainedModel,
    vocabulary: VisualVocabulary,
    generator: torch.Generator,
    matrices: Matrices,
) -> None:
    """Resize embedding and head to the flat vocabulary, in place, and untie the head.

    Embedding: rows [0, first_visual). Head: at least `vocabulary.size` rows; a published model's
    padding rows are kept if they reach beyond. Rows from `num_text` on are new: normal, with the
    text rows' mean vector and standard deviation.

    Args:
        generator: source of the new rows.
        matrices: how embedding and head are stored.

    Raises:
        VocabularyError: if the tokenizer has more text tokens than the embedding rows, or if the
            head has a bias and is partitioned.
    """
    embed = input_embedding(causal_lm)
    old_head = output_head(causal_lm)
    num_text = vocabulary.num_text
    if embed.num_embeddings < num_text:
        raise VocabularyError(
            f"The tokenizer has {num_text} text tokens, but the language model only "
            f"{embed.num_embeddings} embedding rows: they do not belong together. Load both from "
            "the same folder."
        )
    if hasattr(old_head.bias, "ds_tensor"):
        raise VocabularyError(
            f"The head of {type(causal_lm).__name__} has a bias, which cannot grow while the model "
            "is partitioned. Set mllm.train.zero_stage to 2 or lower."
        )

    def grown(old: nn.Parameter, total: int) -> nn.Parameter:
        new = matrices.empty(old, total)
        width = matrices.shape(old)[1]
        grow(matrices.rows(old), matrices.rows(new), num_text, total, width, generator)
        return new

    head = _empty_head(old_head, vocabulary)
    num_head = head.out_features
    head.weight = grown(old_head.get_parameter("weight"), num_head)
    if old_head.bias is not None:
        column = nn.Parameter(old_head.bias.detach()[:, None])
        head.bias = nn.Parameter(grown(column, num_head).detach()[:, 0].contiguous())
    embed.weight = grown(embed.get_parameter("weight"), vocabulary.first_visual)
    _record_rows(embed, vocabulary)
    causal_lm.set_output_embeddings(head)
    untie(causal_lm, num_head)
    set_end_tokens(causal_lm, vocabulary)


def fit_shapes(causal_lm: PreTrainedModel, vocabulary: VisualVocabulary) -> None:
    """As `fit_vocabulary`, but shapes only, without storage.

    For a language model whose weights are loaded later.
    """
    embed = input_embedding(causal_lm)
    shape = (vocabulary.first_visual, embed.embedding_dim)
    embed.weight = nn.Parameter(embed.weight.new_empty(shape, device="meta"))
    _record_rows(embed, vocabulary)
    head = _empty_head(output_head(causal_lm), vocabulary)
    causal_lm.set_output_embeddings(head)
    untie(causal_lm, head.out_features)


def is_fitted(causal_lm: PreTrainedModel, vocabulary: VisualVocabulary) -> bool:
    """Whether `fit_vocabulary` or `fit_shapes` was applied before."""
    head = output_head(causal_lm)
    return (
        isinstance(head, LossHead)
        and head.out_features >= vocabulary.size
        and input_embedding(causal_lm).num_embeddings == vocabulary.first_visual
    )


def set_end_tokens(causal_lm: PreTrainedModel, vocabulary: VisualVocabulary) -> None:
    """Set the end, padding and beginning tokens for `generate` of the exported model.

    A published model's own end tokens are kept.
    """
    generation = causal_lm.generation_config
    ends = end_tokens(causal_lm)
    generation.eos_token_id = ends if vocabulary.eos in ends else [*ends, vocabulary.eos]
    if generation.pad_token_id is None:
        generation.pad_token_id = vocabulary.pad
    if generation.bos_token_id is None and vocabulary.bos is not None:
        generation.bos_token_id = vocabulary.bos


def end_tokens(causal_lm: PreTrainedModel) -> list[int]:
    """The end tokens of the model's generation config (chat turn ends); [] without any."""
    found = getattr(getattr(causal_lm, "generation_config", None), "eos_token_id", None)
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


def untie(causal_lm: PreTrainedModel, vocab_size: int) -> None:
    """Record in a language model that its head is untied, and its number of ids."""
    for config in (causal_lm.config, causal_lm.config.get_text_config()):
        config.tie_word_embeddings = False
        config.vocab_size = vocab_size
    causal_lm.all_tied_weights_keys = {}
    if hasattr(causal_lm, "vocab_size"):
        causal_lm.vocab_size = vocab_size


def _empty_head(old: nn.Linear, vocabulary: VisualVocabulary) -> LossHead:
    """A head on meta with at least a row for each token."""
    rows = max(vocabulary.size, old.out_features)
    return LossHead(old.in_features, rows, bias=old.bias is not None, device="meta")


def _record_rows(embed: nn.Embedding, vocabulary: VisualVocabulary) -> None:
    embed.num_embeddings = vocabulary.first_visual
    embed.padding_idx = None
