"""The small tokenizer: nothing is lost, nothing is random."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Config

from smalti.errors import ConfigError
from smalti.mllm.bpe import SMALLEST, train_bpe

TEXTS = ["a blue circle", "a red square", "is there a circle?", "what colour is it?"] * 5
TOKENIZER = train_bpe(TEXTS, 300)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_comes_back(text: str) -> None:
    if any(special in text for special in ("<pad>", "<bos>", "<eos>")):
        return
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == unicodedata.normalize("NFC", text)


def test_a_folder_with_a_qwen2_model_gives_the_same_tokenizer_back(tmp_path) -> None:
    """transformers takes Qwen2's own pipeline for such folders, whatever tokenizer.json says."""
    TOKENIZER.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(TOKENIZER)
    for text in ("a blue circle", " two  spaces, 1234 & Ünï\n\nline's", "<eos> <bos>"):
        assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_order_of_texts_does_not_matter() -> None:
    shuffled = TEXTS.copy()
    random.Random(1).shuffle(shuffled)
    assert (
        train_bpe(shuffled, 300).backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    )


def test_words_of_the_corpus_become_few_tokens() -> None:
    assert len(TOKENIZER("a blue circle").input_ids) <= 4
    assert len(TOKENIZER) <= 300


def test_specials_come_first() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)


def test_no_text_at_all_gives_the_bytes() -> None:
    assert len(train_bpe([], 300)) == SMALLEST


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="259"):
        train_bpe(TEXTS, 100)
