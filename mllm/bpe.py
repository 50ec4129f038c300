"""A small byte-level BPE tokenizer, trained on a corpus's own text."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smalti.errors import ConfigError

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SPECIALS = (PAD, BOS, EOS)
SMALLEST = 256 + len(SPECIALS)
"""Every byte has a token, so no text is ever unknown."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, `<pad>` 0, `<bos>` 1 and `<eos>` 2 first.

    The same texts, in any order, give the same tokenizer: merges depend on the counts of words, ties on the pair itself.
    Any text, of any script, is encoded and decoded without loss. Fewer tokens come out when the text is too small for more.
    A `vocab_size` under 259 (256 bytes and three special tokens) raises ConfigError.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"A byte-level BPE needs at least {SMALLEST} tokens (256 bytes and {len(SPECIALS)} special tokens), but "
            f"text_vocab_size is {vocab_size}. Set it to {SMALLEST} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
