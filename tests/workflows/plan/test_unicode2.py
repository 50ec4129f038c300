"""The plan of UniCode²: against the real model, and the paper's recipe by hand."""

from __future__ import annotations

import pytest
import torch

from smalti.config import load_recipe
from smalti.mllm.bpe import train_bpe
from smalti.mllm.build import build_unified
from smalti.workflows.plan.base import gpu_rates
from smalti.workflows.plan.trial import Setting, Trial
from smalti.workflows.recipe_plan import RecipePlan
from smalti.workflows.systems.registry import system_of

TEXTS = ["a blue circle", "a red square"] * 3
K, WIDTH = 64, 16


def small(*overrides: str):
    tokens = len(train_bpe(TEXTS, 290))
    model = f"{{hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 64, text_vocab_size: {tokens}}}"
    encoder = f"{{patch_size: 8, hidden_size: {WIDTH}, layers: 1, heads: 2, text_layers: 1}}"
    own = [
        f"mllm.config={model}",
        f"encoder.train={encoder}",
        "corpus.image_size=32",
        "mllm.max_length=32",
    ]
    own += [f"codebook.size={K}", "codebook.coarse=4"]
    return load_recipe(None, ["system=unicode2", *own, *overrides])


class Codes:
    num_codes, code_shape, embed_splits = K, (), (WIDTH,)

    def code_vectors(self) -> torch.Tensor:
        return torch.randn(K, WIDTH)


@pytest.mark.parametrize("adapter", ["cascade", "single"])
def test_planned_parameters_are_those_of_the_real_model(adapter: str) -> None:
    recipe = small(f"mllm.adapter={adapter}")
    planned = {model.name: model for model in system_of(recipe).planned_models(recipe)}
    assert list(planned) == ["encoder", "mllm"]
    real = build_unified(recipe.mllm, train_bpe(TEXTS, 290), Codes())
    assert planned["mllm"].parameters("model") == sum(p.numel() for p in real.parameters())
    assert planned["mllm"].frozen == sum(b.numel() for b in real.buffers())


def test_the_papers_recipe_by_hand() -> None:
    """Qwen2.5-7B has 7.616B parameters with two matrices of 152,064 rows of 3,584."""
    recipe = load_recipe("unicode2-500k", ["mllm.stages=[]"])
    (model,) = system_of(recipe).planned_models(recipe, gpu=True)
    assert model.head is not None and model.head.rows == 151_665 + 4 + 500_000
    projector = 1152 * 3584 + 3584 + 3584 * 3584 + 3584
    by_hand = (
        7_615_616_512 - 2 * 152_064 * 3584 + (151_669 + 651_669) * 3584 + projector + 500_000 * 1152
    )
    assert model.parameters("model") == by_hand
    assert model.largest == 651_669 * 3584


def test_the_whole_plan_of_a_small_recipe() -> None:
    """Stages over images by hand: the encoder as a plan traces it, and a patch against cells and
    codes.
    """
    stages = "[{from_step: 0, freeze: [backbone, new_rows]}, {from_step: 300, freeze: []}, {from_step: 500}]"
    recipe = small(
        f"mllm.stages={stages}", "mllm.train={steps: 1000, batch_size: 8}", "features.source=x"
    )
    plan = RecipePlan(recipe, gpu_rates("h100"), 8, vectors=1600)
    assert (
        plan.images == max(1000 * 8, recipe.encoder.train.train.steps * 64) and plan.featured == 100
    )
    looks = plan.inference
    assert looks["tokens"].flops["fp32"] - looks["features"].flops["fp32"] == 2 * 16 * K * WIDTH
    assert looks["tokens"].memory - looks["features"].memory == 4 * (K + 4) * WIDTH
    told = "\n".join(plan.lines())
    assert not plan.refusals
    adapter = K * WIDTH + WIDTH * 32 + 32 + 32 * 32 + 32
    assert f"steps 0 to 300: {adapter / 1e9:.3g}B parameters train (adapter)" in told
    assert "steps 300 to 1,000:" in told and "codebook: N = 1,600 vectors" in told
    large = RecipePlan(
        small("codebook.size=20000", "codebook.coarse=100"), gpu_rates("h100"), 8
    ).inference
    assert (
        large["tokens"].flops["fp32"] - large["features"].flops["fp32"]
        == 2 * 16 * (100 + 4 * 200) * WIDTH
    )


def test_the_second_codebook_takes_states_and_what_zero_3_gathers() -> None:
    with_it, without = (
        list(
            system_of(small(f"mllm.adapter={name}")).planned_models(small(f"mllm.adapter={name}"))
        )[-1]
        for name in ("cascade", "single")
    )
    found = [Trial(model).memory(Setting(4, 2, 3)) for model in (with_it, without)]
    assert found[0]["states"] - found[1]["states"] == 20 * K * WIDTH / 4
    assert found[1]["frozen"] - found[0]["frozen"] == 4 * K * WIDTH, (
        "the frozen codebook lies whole on each GPU"
    )
