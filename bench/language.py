"""Small unified models, and batches of sequences of two length distributions, for the benchmarks of
the language model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalti.config import load_recipe
from smalti.mllm.bpe import train_bpe
from smalti.mllm.build import build_unified
from smalti.mllm.model import UnifiedModel
from smalti.mllm.sequences import SequenceBuilder, TokenSequence
from smalti.schema import CorpusSection, LanguageModel, MllmSection

BATCHES, LONG_TAIL_BATCH = 40, 64
Made = tuple[UnifiedModel, list[list[TokenSequence]]]


@dataclass(frozen=True)
class RandomCodes:
    """The language model's view of a visual tokenizer: random code vectors of two parts."""

    num_codes: int
    code_shape: tuple[int, ...] = ()
    embed_splits: tuple[int, ...] = (48, 8)

    def code_vectors(self) -> Tensor:
        return torch.randn(
            self.num_codes, sum(self.embed_splits), generator=torch.Generator().manual_seed(0)
        )


def small_model(
    size: LanguageModel, num_codes: int, texts: list[str], max_length: int
) -> tuple[UnifiedModel, Any]:
    """A unified model with random weights, and its tokenizer."""
    hf_tokenizer = train_bpe(texts, size.text_vocab_size)
    section = MllmSection(config=size, max_length=max_length)
    return build_unified(section, hf_tokenizer, RandomCodes(num_codes)), hf_tokenizer


def quickstart() -> Made:
    """Micro batches of the quickstart's mixture from step 0: easy-vqa's own captions and questions,
    64 random codes an image.
    """
    from smalti.workflows.sources.easy_vqa import easy_vqa_groups

    recipe = load_recipe("recipes/semhitok-quickstart.yaml")
    section, rng = recipe.mllm, np.random.default_rng(0)
    (group,) = easy_vqa_groups("easy-vqa:train", CorpusSection(shard_images=100_000), 0)
    rows = []
    for sample in group.samples():
        qa = [{"question": question, "answer": answer} for question, answer in sample.qa]
        rows.append({"caption": sample.caption, "qa": qa, "codes": rng.integers(0, 1000, 64)})
    texts = [pair[key] for row in rows for pair in row["qa"] for key in ("question", "answer")]
    assert section.config is not None
    model, hf_tokenizer = small_model(section.config, 1000, texts, section.max_length)
    names = ("questions_per_image", "max_length", "uncond_probability", "mixture")
    builder = SequenceBuilder(
        hf_tokenizer, model.vocabulary, **{name: getattr(section, name) for name in names}
    )
    micro = section.train.batch_size // recipe.resources.workers
    batches = []
    for _ in range(BATCHES):
        chosen = [rows[i] for i in rng.integers(len(rows), size=micro)]
        batches.append(
            [builder.build(builder.sample_kind(row, rng) or "qa", row, rng) for row in chosen]
        )
    return model, batches


def long_tailed() -> Made:
    """85 % images of 256 codes with a caption (log-normal, median 40 tokens, deviation 0.7), 15 %
    text (log-normal, mean 427 tokens as C4's documents, 156 billion tokens in 365 million;
    deviation 1.0), cut at 2,048.
    """
    size = LanguageModel(
        hidden_size=128, layers=2, heads=4, kv_heads=4, intermediate_size=512, text_vocab_size=512
    )
    model, hf_tokenizer = small_model(size, 1000, ["a a a"], 2048)
    builder = SequenceBuilder(hf_tokenizer, model.vocabulary, max_length=2048)
    rng = np.random.default_rng(0)

    def one() -> TokenSequence:
        if rng.random() < 0.15:
            return builder.build(
                "text", {"text": words(rng.lognormal(np.log(427) - 0.5, 1.0))}, rng
            )
        row = {
            "codes": rng.integers(0, 1000, 256),
            "caption": words(rng.lognormal(np.log(40), 0.7)),
        }
        return builder.build(
            "caption_to_image" if rng.random() < 0.6 else "image_to_caption", row, rng
        )

    return model, [[one() for _ in range(LONG_TAIL_BATCH)] for _ in range(BATCHES)]


def words(count: float) -> str:
    """Text of that many tokens."""
    return " ".join(["a"] * max(1, round(count)))


MIXTURES: dict[str, tuple[Callable[[], Made], int]] = {
    "quickstart": (quickstart, 384),
    "long-tailed": (long_tailed, 2048),
}
"""name → what makes model and batches, and the length of a packed row."""
