"""Arithmetic of ids, extension of tokenizers, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from smalti.errors import VocabularyError
from smalti.mllm.bpe import train_bpe
from smalti.mllm.vocabulary import DELIMITERS, VisualVocabulary, visual_token

TEXTS = ["a blue circle", "is it red?"] * 3


@given(num_text=st.integers(1, 200_000), num_codes=st.integers(1, 500_000), data=st.data())
def test_ids_and_codes_are_inverse(num_text: int, num_codes: int, data: st.DataObject) -> None:
    first = num_text + 4
    vocabulary = VisualVocabulary(
        num_text, first, num_codes, num_text, num_text + 1, num_text + 2, num_text + 3, 0, 0, None
    )
    codes = torch.tensor(
        data.draw(st.lists(st.integers(0, num_codes - 1), min_size=1, max_size=20))
    )
    ids = vocabulary.to_ids(codes)
    assert torch.equal(vocabulary.to_codes(ids), codes)
    assert vocabulary.is_visual(ids).all()
    assert int(ids.max()) < vocabulary.size


def test_extension_keeps_text_and_puts_codes_in_order() -> None:
    hf_tokenizer = train_bpe(TEXTS, 280)
    before = len(hf_tokenizer)
    text_ids = hf_tokenizer("a blue circle").input_ids
    vocabulary = VisualVocabulary.extend(hf_tokenizer, 10)
    assert hf_tokenizer("a blue circle").input_ids == text_ids
    assert vocabulary.num_text == before
    assert [vocabulary.boi, vocabulary.eoi, vocabulary.und_start, vocabulary.und_end] == [
        before + i for i in range(4)
    ]
    assert hf_tokenizer.convert_ids_to_tokens(vocabulary.first_visual + 9) == visual_token(9)
    assert vocabulary.size == len(hf_tokenizer)


def test_saved_and_loaded_tokenizer_gives_the_same_layout(tmp_path) -> None:
    hf_tokenizer = train_bpe(TEXTS, 280)
    vocabulary = VisualVocabulary.extend(hf_tokenizer, 10)
    hf_tokenizer.save_pretrained(tmp_path)
    assert VisualVocabulary.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == vocabulary


def test_codes_survive_decoding_without_special_tokens() -> None:
    hf_tokenizer = train_bpe(TEXTS, 280)
    vocabulary = VisualVocabulary.extend(hf_tokenizer, 10)
    ids = [
        vocabulary.boi,
        *range(vocabulary.first_visual, vocabulary.first_visual + 3),
        vocabulary.eoi,
    ]
    assert hf_tokenizer.decode(ids, skip_special_tokens=True) == "<IMG_0><IMG_1><IMG_2>"


def test_delimiters_that_a_tokenizer_has_are_used_again() -> None:
    hf_tokenizer = train_bpe(TEXTS, 280)
    hf_tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_image>", "<more>"]})
    before = len(hf_tokenizer)
    vocabulary = VisualVocabulary.extend(hf_tokenizer, 5)
    assert vocabulary.boi == before - 2
    assert vocabulary.num_text == before
    assert vocabulary.first_visual == before + 3


def test_padding_token_is_the_end_token_where_there_is_none() -> None:
    hf_tokenizer = train_bpe(TEXTS, 280)
    hf_tokenizer.pad_token = None
    vocabulary = VisualVocabulary.extend(hf_tokenizer, 5)
    assert vocabulary.pad == vocabulary.eos == hf_tokenizer.pad_token_id


def test_codes_outside_are_named_with_their_source() -> None:
    vocabulary = VisualVocabulary.extend(train_bpe(TEXTS, 280), 10)
    with pytest.raises(
        VocabularyError,
        match=r"tokens/train/00003 holds visual ids up to 12, but this model has 10 visual codes",
    ):
        vocabulary.to_ids(torch.tensor([3, 12]), "tokens/train/00003")
    with pytest.raises(VocabularyError, match="-1"):
        vocabulary.to_ids(torch.tensor([-1]))
    with pytest.raises(VocabularyError, match="is not a visual code"):
        vocabulary.to_codes(torch.tensor([vocabulary.boi]))


def test_wrong_tokenizers_are_refused() -> None:
    plain = train_bpe(TEXTS, 280)
    with pytest.raises(VocabularyError, match="has no <IMG_0>"):
        VisualVocabulary.from_tokenizer(plain)
    endless = copy.deepcopy(plain)
    endless.eos_token = None
    with pytest.raises(VocabularyError, match="end-of-sequence"):
        VisualVocabulary.extend(endless, 5)
    VisualVocabulary.extend(plain, 5)
    with pytest.raises(VocabularyError, match="already"):
        VisualVocabulary.extend(plain, 5)
    with pytest.raises(VocabularyError, match="at least 1"):
        VisualVocabulary.extend(train_bpe(TEXTS, 280), 0)


def test_error_and_vocabulary_pickle() -> None:
    vocabulary = VisualVocabulary.extend(train_bpe(TEXTS, 280), 5)
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary
    assert len(set(DELIMITERS)) == 4


@pytest.mark.slow
def test_a_large_vocabulary_is_added_in_seconds() -> None:
    vocabulary = VisualVocabulary.extend(train_bpe(TEXTS, 280), 196_608)
    assert vocabulary.num_codes == 196_608
