"""A small byte-level BPE tokenizer, trained on a corpus's own text.

It uses the pipeline of Qwen2's tokenizer (NFC, Qwen2's split into words, byte level), because a
folder with a Qwen2 model is always loaded with that pipeline: transformers 5 reads only vocabulary
and merges from `tokenizer.json` there. A tokenizer with another split would tokenize differently
after the export.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from transformers import Qwen2Tokenizer

from smalti.errors import ConfigError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

BOS = "<bos>"
EOS = "<eos>"
PAD = "<pad>"
SPECIALS = (PAD, BOS, EOS)
SMALLEST = 256 + len(SPECIALS)
"""Smallest vocabulary: every byte has a token, so no text is unknown."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer.

    The same texts, in any order, give the same tokenizer: merges depend on the counts of words,
    ties on the pair itself. Text of any script is decoded as its NFC form.

    Args:
        texts: the corpus.
        vocab_size: most tokens, at least 259 (256 bytes and three special tokens).

    Returns:
        The tokenizer, with `<pad>` 0, `<bos>` 1 and `<eos>` 2. It has fewer than `vocab_size`
        tokens if there is too little text.

    Raises:
        ConfigError: if `vocab_size` is below 259.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"A byte-level BPE needs at least {SMALLEST} tokens (256 bytes and {len(SPECIALS)} "
            f"special tokens), but text_vocab_size is {vocab_size}. Set it to {SMALLEST} or more."
        )
    pipeline = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = pipeline.normalizer
    tokenizer.pre_tokenizer = pipeline.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in trained["merges"]]  # annotated as list[str]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=merges,
        unk_token=EOS,  # never used, every byte is known; without it transformers adds a token
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
