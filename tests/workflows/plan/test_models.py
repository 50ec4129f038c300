"""The planner traces the steps of the training tasks themselves.

Covers: workflows/plan/language_tasks.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor, nn

from smalti.config import load_recipe
from smalti.tokenizers.encoders import VisionEncoder
from smalti.workflows.plan import image_tasks
from smalti.workflows.plan.base import gpu_rates
from smalti.workflows.plan.trial import Trial
from smalti.workflows.recipe_plan import RecipePlan
from smalti.workflows.train.deepspeed_compat import Engine
from smalti.workflows.train.task import Batch, Context, Metrics
from smalti.workflows.train.tasks.images import to_unit
from smalti.workflows.train.tasks.semantic import SemanticTask

BEFORE = Path(__file__).with_name("planned_76c1ccd.json")
"""Figures on 32 H100 of commit 76c1ccd, whose planner rewrote the steps that it now traces."""
WIDTH = 512


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semhitok-256", "dualtoken-384", "unicode2-500k"])
def test_shipped_recipes_keep_their_figures(name: str) -> None:
    before = json.loads(BEFORE.read_text())[name]
    plan = RecipePlan(load_recipe(name), gpu_rates("h100"), 32)
    assert plan.data_hours == pytest.approx(before["data_hours"], rel=0.01)
    assert sum(size for _, size, _ in plan.stored) == pytest.approx(before["stored"], rel=0.01)
    assert [stage.model.name for stage in plan.trained] == list(before["stages"])
    for stage in plan.trained:
        figures = {
            "parameters": stage.model.parameters(),
            "trained": sum(stage.model.parameters(engine) for engine in stage.model.engines),
            "memory": sum(stage.memory.values()),
            "traffic": stage.traffic,
            "flops": stage.flops,
            "hours": stage.hours,
        }
        assert figures == pytest.approx(before["stages"][stage.model.name], rel=0.01)


class SemanticWithProduct(SemanticTask):
    """A task whose loss has one product more: of an image's pixels with a matrix that trains."""

    def build(self, context: Context, encoder: VisionEncoder | None, *, load: bool = True) -> None:
        super().build(context, encoder, load=load)
        self.tokenizer.extra = nn.Linear(3 * self.image_size**2, WIDTH, bias=False)

    def loss(
        self,
        name: str,
        engines: Mapping[str, Engine],
        batch: Batch,
        step: int,
        share: Tensor | None,
    ) -> tuple[Tensor, Metrics] | None:
        found = super().loss(name, engines, batch, step, share)
        assert found is not None
        extra = engines[name].module.get_submodule("extra")
        return found[0] + extra(to_unit(batch["pixels"]).flatten(1)).square().mean(), found[1]


def semantic_trial() -> Trial:
    recipe = load_recipe("semhitok-quickstart", ["tokenizer.semantic.decoder_layers=1"])
    return Trial(image_tasks.semantic_model(recipe, gpu=False))


def test_a_task_whose_loss_does_more_has_a_plan_with_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 2·3·S²·WIDTH FLOPs an image in the forward pass, as many for the weight's gradient."""
    plain = semantic_trial()
    monkeypatch.setattr(image_tasks, "SemanticTask", SemanticWithProduct)
    more = semantic_trial()
    size = 3 * plain.model.pixels**2 * WIDTH
    assert more.model.parameters("model") - plain.model.parameters("model") == size
    assert more.flops()["fp32"] - plain.flops()["fp32"] == 2 * 2 * size
    assert more.calls() > plain.calls()
