"""Small recipes and models that tests of the planner share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smalti.config import load_recipe
from smalti.schema import LanguageModel, Lora, MllmSection, Train
from smalti.workflows.plan import language_tasks
from smalti.workflows.plan.models import Model

SMALL = [
    "encoder.train.layers=1", "encoder.train.train.precision=bf16", "tokenizer.semantic.decoder_layers=1",
    "tokenizer.pixel.encoder.layers=1", "tokenizer.pixel.decoder.layers=1", "tokenizer.pixel.loss.gan.weight=0.5",
    "tokenizer.pixel.loss.gan.start_step=0", "tokenizer.pixel.loss.gan.channels=16",
    "tokenizer.pixel.loss.perceptual.kind=encoder", "mllm.train.precision=bf16", "mllm.config.layers=1", "mllm.max_length=128",
    "mllm.loss_chunk=64",
]  # fmt: skip
BATCH = 4
ROOT = Path(__file__).resolve().parents[3]


def language_model(freeze: Any = (), lora: Lora | None = None, **train: Any) -> Model:
    """The language model alone, on meta: width 64, 2 layers."""
    size = LanguageModel(
        hidden_size=64, layers=2, heads=2, kv_heads=2, intermediate_size=128, text_vocab_size=300
    )
    section = MllmSection(
        config=size,
        max_length=32,
        loss_chunk=8,
        train=Train(**train),
        freeze=list(freeze),
        lora=lora,
    )
    recipe = load_recipe("semhitok-quickstart")
    return language_tasks.language_model(
        section, recipe.codebook.size * recipe.tokenizer.pixel.codes, (8, 8)
    )
