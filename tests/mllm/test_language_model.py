"""Rows of a language model fitted to the flat vocabulary, and models that are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2ForCausalLM,
)

from smalti.errors import VocabularyError
from smalti.mllm.adapters import SingleAdapter
from smalti.mllm.bpe import train_bpe
from smalti.mllm.language_model import check_supported, fit_vocabulary
from smalti.mllm.model import UnifiedModel
from smalti.mllm.rows import WholeMatrices
from smalti.mllm.vocabulary import VisualVocabulary


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 3, 100])
def test_old_rows_stay_new_rows_differ_and_the_head_is_its_own(
    make_tiny, tied: bool, padding: int
) -> None:
    tiny = make_tiny(tied=tied, padding=padding)
    v, lm = tiny.vocabulary, tiny.model.lm
    embed, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    assert embed.shape == (v.first_visual, 32)
    assert head.shape == (max(v.size, v.num_text + padding), 32)
    assert torch.equal(
        embed[: v.num_text], tiny.original["model.embed_tokens.weight"][: v.num_text]
    )
    assert torch.equal(head[: v.num_text], tiny.original["lm_head.weight"][: v.num_text])
    assert embed.data_ptr() != head.data_ptr()
    assert lm.config.tie_word_embeddings is False
    assert lm.config.vocab_size == len(head)
    new = head[v.num_text :]
    assert len(new.unique(dim=0)) == len(new)
    assert 0.5 < float(new.detach().std() / head[: v.num_text].detach().std()) < 2


def test_new_rows_are_seeded(make_tiny) -> None:
    one, same, other = make_tiny(), make_tiny(), make_tiny(seed=1)
    heads = [tiny.model.lm.get_output_embeddings().weight for tiny in (one, same, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_models_with_other_heads_are_refused_with_the_reason() -> None:
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = Gemma2Config(
        vocab_size=50, intermediate_size=16, head_dim=8, final_logit_softcapping=30.0, **size
    )
    with pytest.raises(VocabularyError, match="final_logit_softcapping"):
        check_supported(Gemma2ForCausalLM(config))


def test_a_language_model_of_another_tokenizer_is_refused() -> None:
    hf_tokenizer = train_bpe(["a b"], 260)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2))
    vocabulary = VisualVocabulary.extend(hf_tokenizer, 6)
    with pytest.raises(VocabularyError, match="do not belong together"):
        UnifiedModel(lm, SingleAdapter((4,), 8, 16), torch.randn(6, 4), vocabulary)


def test_a_head_with_a_bias_that_lies_in_parts_is_refused_with_the_setting(tiny) -> None:
    lm = Qwen2ForCausalLM(tiny.model.lm.config)
    lm.lm_head = torch.nn.Linear(32, lm.config.vocab_size)
    lm.lm_head.bias.ds_tensor = lm.lm_head.bias[:1]  # as ZeRO-3 leaves a parameter
    with pytest.raises(VocabularyError, match=r"has a bias, which .*zero_stage to 2 or lower"):
        fit_vocabulary(lm, tiny.vocabulary, torch.Generator(), WholeMatrices())
