"""A small unified model: Qwen2 of width 32, two layers, tied head, padded past its tokenizer, with 24 codes in two parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from smalti.mllm.adapters import DualAdapter
from smalti.mllm.bpe import train_bpe
from smalti.mllm.model import UnifiedModel
from smalti.mllm.prompts import TextEncoder
from smalti.mllm.vocabulary import VisualVocabulary

TEXTS = ["a blue circle", "a red square", "is it red?", "what shape is it?", "yes", "no"] * 4
NUM_CODES = 24


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Tiny:
    """A unified model and what belongs to it."""

    model: UnifiedModel
    hf_tokenizer: Any
    vocabulary: VisualVocabulary
    text: TextEncoder
    original: dict[str, torch.Tensor]


def make_lm(num_text: int, *, padding: int = 3, tied: bool = True, seed: int = 0) -> Qwen2ForCausalLM:
    """A random Qwen2 with large enough weights that its outputs differ clearly."""
    config = Qwen2Config(
        vocab_size=num_text + padding, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def make_tiny() -> Callable[..., Tiny]:
    """A factory of fresh models: `make_tiny(tied=…, padding=…, seed=…)`."""

    def make(seed: int = 0, **options: Any) -> Tiny:
        hf_tokenizer = train_bpe(TEXTS, 290)
        lm = make_lm(len(hf_tokenizer), seed=seed, **options)
        original = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
        vocabulary = VisualVocabulary.extend(hf_tokenizer, NUM_CODES)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = UnifiedModel(lm, DualAdapter((6, 3), 16, 32), 5 * torch.randn(NUM_CODES, 9), vocabulary)
        model.match_scales()
        return Tiny(model.eval(), hf_tokenizer, vocabulary, TextEncoder(hf_tokenizer, vocabulary), original)

    return make


@pytest.fixture
def tiny(make_tiny: Callable[..., Tiny]) -> Tiny:
    return make_tiny()
