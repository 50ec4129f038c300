"""The plan of DualToken's stages: against the real models' parameters and the memory of a real step
on the CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import SiglipVisionModel

from smalti.config import load_recipe, with_overrides
from smalti.mllm.bpe import train_bpe
from smalti.mllm.build import build_unified
from smalti.schema import Recipe
from smalti.tokenizers.dualtoken import DualModel, DualToken
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.siglip import build_siglip
from smalti.workflows.plan.base import gpu_rates
from smalti.workflows.plan.trial import Setting, Trial
from smalti.workflows.recipe_plan import RecipePlan
from smalti.workflows.systems.registry import system_of

BATCH, ROOT, TOKENS = 4, Path(__file__).resolve().parents[3], 300
SMALL = [
    "encoder={pretrained: null, train: {hidden_size: 64, layers: 2, heads: 2, text_layers: 1, text_vocab_size: 300}, layer: -2}",
    "corpus.image_size=64", "tokenizer.dual.codes=512", "tokenizer.dual.depth=2", "tokenizer.dual.pixel_layers=[1]", "tokenizer.dual.pixel_weights=[1.0]",
    "tokenizer.dual.decoder={dim: 64, layers: 1, heads: 2}", "tokenizer.dual.loss.perceptual={kind: encoder}",
    "tokenizer.dual.loss.gan={channels: 16, start_step: 0}", "mllm.pretrained=null",
    f"mllm.config={{hidden_size: 128, layers: 1, heads: 4, kv_heads: 2, intermediate_size: 256, text_vocab_size: {TOKENS}}}",
    "mllm.depth_heads={layers: 1, heads: 4}", "mllm.max_length=64", "mllm.loss_chunk=64",
    "mllm.train={activation_checkpointing: false, zero_stage: 0}", "tokenizer.dual.train.zero_stage=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("dualtoken-384", SMALL)


@pytest.fixture(scope="module")
def measured(recipe: Recipe) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    from bench.real_steps import measure

    return dict(measure(recipe, BATCH))


@pytest.mark.parametrize("name", ["dual", "mllm"])
def test_memory_is_what_real_tensors_take(
    name: str, recipe: Recipe, measured: dict[str, Any]
) -> None:
    stays, passing, _ = measured[name]
    planned = Trial(
        next(model for model in system_of(recipe).planned_models(recipe) if model.name == name)
    ).memory(Setting(1, BATCH, 0))
    assert planned["states"] + planned["frozen"] == pytest.approx(stays, rel=0.02)
    assert planned["activations"] + planned["logits"] == pytest.approx(passing, rel=0.15)


def test_parameters_are_those_of_the_real_models(recipe: Recipe) -> None:
    size = recipe.encoder.train
    assert size is not None
    tower: Any = build_siglip(size, 64, 300, 0, 1).config.vision_config
    dual = DualModel(recipe.tokenizer.dual, VisionEncoder(SiglipVisionModel(tower), -2))
    trained = sum(p.numel() for p in dual.parameters() if p.requires_grad)
    hf_tokenizer = train_bpe(["a thing of kind 0"], TOKENS)
    known = with_overrides(recipe, {"mllm.config.text_vocab_size": len(hf_tokenizer)})
    model = build_unified(known.mllm, hf_tokenizer, DualToken(dual))
    planned = {m.name: m.parameters("model") for m in system_of(known).planned_models(known)}
    assert planned["dual"] == trained
    assert planned["mllm"] == sum(p.numel() for p in model.parameters())


def test_a_plan_has_no_clustering_and_every_code_of_a_token(recipe: Recipe) -> None:
    plan = RecipePlan(recipe, gpu_rates("h100"), 4, images=1000)
    assert (
        plan.codebook is None and plan.codes_a_token == 2 * 2 and list(plan.inference) == ["tokens"]
    )
    assert [model.name for model in plan.models] == ["encoder", "dual", "mllm"]


def test_parameters_at_the_papers_size() -> None:
    """So400m up to block 26 and a decoder of 12 blocks; Qwen2.5-3B untied, 16 classifiers, two
    transformers of 3 blocks.
    """
    dual, mllm = system_of(load_recipe("dualtoken-384")).planned_models(
        load_recipe("dualtoken-384")
    )
    heads = 2 * 8 * 16_384 * 2048 + 2 * 3 * 12 * 2048**2
    assert mllm.parameters("model") == pytest.approx(3.09e9 + 151_936 * 2048 + heads, rel=0.02)
    assert dual.parameters("model") == pytest.approx(26 * 15.2e6 + 12 * 12 * 1024**2, rel=0.05)
