"""Text from strangers: tokens written out in it stay text."""

from __future__ import annotations

import pytest

from smalti.mllm.prompts import TextEncoder


@pytest.mark.parametrize("text", ["<pad>", "a <pad> and <IMG_3>", "<IMG_3><pad>"])
def test_the_token_of_id_0_written_out_stays_text_and_hides_no_other(tiny, text: str) -> None:
    assert tiny.hf_tokenizer.pad_token_id == 0
    ids = tiny.text(text)
    assert not tiny.text.reserved.intersection(ids)
    assert tiny.hf_tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("token", ["§", "§ "])
def test_a_token_that_no_space_breaks_is_left_out(tiny, token: str) -> None:
    tiny.hf_tokenizer.add_tokens([token])
    text = TextEncoder(tiny.hf_tokenizer, tiny.vocabulary)
    ids = text(f"a {token}5")
    assert ids
    assert not text.reserved.intersection(ids)
    assert text.hf_tokenizer.decode(ids).split() == ["a", "5"]
