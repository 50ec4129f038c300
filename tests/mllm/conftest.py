"""A small unified model: Qwen2 of width 32, two layers, tied head, padded past its tokenizer, with
24 codes in two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smalti.schema import (
    EncoderTrain,
    LanguageModel,
    MllmSection,
    PixelStage,
    SemanticStage,
    TokenizerSection,
    VitSize,
)

if TYPE_CHECKING:  # transformers: four seconds for a file of tests that needs none of it
    from transformers import Qwen2ForCausalLM

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


def make_lm(
    num_text: int, *, padding: int = 3, tied: bool = True, seed: int = 0
) -> Qwen2ForCausalLM:
    """A random Qwen2 with large enough weights that its outputs differ clearly."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

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
    from smalti.mllm.adapters import DualAdapter
    from smalti.mllm.bpe import train_bpe
    from smalti.mllm.model import UnifiedModel
    from smalti.mllm.prompts import TextEncoder
    from smalti.mllm.vocabulary import VisualVocabulary

    def make(seed: int = 0, **options: Any) -> Tiny:
        hf_tokenizer = train_bpe(TEXTS, 290)
        lm = make_lm(len(hf_tokenizer), seed=seed, **options)
        original = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
        vocabulary = VisualVocabulary.extend(hf_tokenizer, NUM_CODES)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = UnifiedModel(
                lm, DualAdapter((6, 3), 16, 32), 5 * torch.randn(NUM_CODES, 9), vocabulary
            )
        model.start_visual()
        return Tiny(
            model.eval(), hf_tokenizer, vocabulary, TextEncoder(hf_tokenizer, vocabulary), original
        )

    return make


@pytest.fixture
def tiny(make_tiny: Callable[..., Tiny]) -> Tiny:
    return make_tiny()


@pytest.fixture(scope="session")
def visual_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real SemHiTok of 8 · 3 = 24 codes saved in a folder: 32 px, 4 x 4 patches, random weights."""
    from smalti.tokenizers.encoders import VisionEncoder
    from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok
    from smalti.tokenizers.siglip import build_siglip

    torch.set_num_threads(1)
    tiny_vit = VitSize(dim=16, layers=1, heads=2, mlp_ratio=2)
    section = TokenizerSection(
        semantic=SemanticStage(dim=6, decoder_dim=16, decoder_heads=2, decoder_layers=1),
        pixel=PixelStage(codes=3, dim=3, encoder=tiny_vit, decoder=tiny_vit),
    )
    size = EncoderTrain(
        patch_size=8, hidden_size=24, layers=1, heads=2, text_layers=1, text_length=6
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        siglip = tmp_path_factory.mktemp("siglip")
        build_siglip(size, 32, 40, 0, 1).save_pretrained(siglip)
        encoder = VisionEncoder.from_pretrained(str(siglip))
        semantic = SemanticTokenizer(24, section.semantic, 8)
        semantic.init_from(torch.randn(8, 24))
        pixel = PixelTokenizer(section.pixel, semantic.quantizer.codes, 32, (4, 4))
        tokenizer = SemHiTok(section, pixel, semantic, encoder)
    path = tmp_path_factory.mktemp("visual_tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def make_unified(visual_tokenizer_dir: str) -> Callable[..., tuple[UnifiedModel, Any]]:
    """A unified model built as a recipe would, on that tokenizer: `make_unified(adapter=…)` →
    (model, hf_tokenizer).
    """
    from smalti.mllm.bpe import train_bpe
    from smalti.mllm.build import build_unified
    from smalti.tokenizers.loading import load_tokenizer

    def make(**settings: Any) -> tuple[UnifiedModel, Any]:
        size = LanguageModel(
            hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, text_vocab_size=290
        )
        section = MllmSection(config=size, max_length=64, **settings)
        hf_tokenizer = train_bpe(TEXTS, 290)
        model = build_unified(section, hf_tokenizer, load_tokenizer(visual_tokenizer_dir), seed=3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(
                    0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                )
        return model.eval(), hf_tokenizer

    return make
