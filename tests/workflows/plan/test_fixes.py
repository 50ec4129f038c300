"""Plans that do not fit name the smallest change with which they do."""

from __future__ import annotations

import re
from dataclasses import replace

from smalti.workflows.plan.base import Rates
from smalti.workflows.plan.training import TrainPlan
from smalti.workflows.plan.trial import Setting, Trial
from tests.workflows.plan.small_plans import language_model


def test_what_cannot_fit_names_the_smallest_change_that_does() -> None:
    model = language_model(steps=9, batch_size=32, micro_batch_size=4)
    trial = Trial(model)
    box = Rates("box", 1e12, 1e9, 16e9, "stated")
    needed = sum(trial.memory(Setting(4, 2, 0)).values())
    plan = TrainPlan(trial, replace(box, memory=needed / 0.92 + 1), 4)
    refusal = plan.refusal() or ""
    assert re.search(
        r"mllm needs .* on each box, of .*activations .*With mllm\.train\.micro_batch_size=2 it is",
        refusal,
    )
    assert plan.fits(Setting(4, 2, 0)) and not plan.fits(plan.setting)
    assert TrainPlan(trial, box, 4).refusal() is None
    zero = TrainPlan(
        Trial(language_model(steps=9, batch_size=32, zero_stage=2, offload="cpu")), box, 4
    )
    assert zero.memory["states"] == 4 * model.parameters("model"), (
        "gradients and moments lie in main memory"
    )
    hopeless = TrainPlan(trial, replace(box, memory=1e5), 4).refusal() or ""
    assert "Nothing that is tried here makes it fit" in hopeless


def test_the_mend_tries_every_divisor_of_a_micro_batch() -> None:
    trial = Trial(language_model(steps=9, batch_size=48, micro_batch_size=12))
    needed = sum(trial.memory(Setting(4, 4, 0)).values())
    refusal = (
        TrainPlan(trial, Rates("box", 1e12, 1e9, needed / 0.92 + 1, "stated"), 4).refusal() or ""
    )
    assert "With mllm.train.micro_batch_size=4 it is" in refusal


def test_more_gpus_are_proposed_where_every_stage_can_share_its_batch_among_them() -> None:
    """A box without main memory to speak of, so that offload is no way out; the other stage's batch
    is 12.
    """
    train = {
        "micro_batch_size": 1,
        "zero_stage": 3,
        "activation_checkpointing": True,
        "data_gb": 1e-9,
    }
    trial = Trial(language_model(steps=9, batch_size=32, **train))
    needed = sum(trial.memory(Setting(8, 1, 3, True)).values())
    host = (
        sum(
            TrainPlan(trial, Rates("box", 1e12, 1e9, needed, "stated"), 4)
            .host(Setting(4, 1, 3))
            .values()
        )
        / 0.6
        + 1
    )
    box = Rates("box", 1e12, 1e9, needed / 0.92 + 1, "stated", host=host)
    assert "With --gpus 8 it is" in (TrainPlan(trial, box, 4).refusal() or "")
    other = language_model(steps=9, batch_size=12)
    assert "Nothing that is tried" in (TrainPlan(trial, box, 4, [other]).refusal() or "")
