"""Traffic, time and main memory of trained stages: against two real workers, and by hand."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import pytest

from smalti.schema import Recipe, Train
from smalti.workflows.plan.base import Rates
from smalti.workflows.plan.training import TrainPlan
from smalti.workflows.plan.trial import Setting, Trial
from smalti.workflows.train import engines
from tests.workflows.plan.small_plans import ROOT, language_model


def counted_traffic(sizes: dict[str, int]) -> dict[str, float]:
    """On one of two workers: bytes that it sends in a real step, ZeRO-3's sizes being these."""
    sys.path.insert(0, str(ROOT))
    from bench.traffic import counted

    engines.STAGE_3 |= sizes
    return {name: counted(made).sent for name, made in traffic_recipes().items()}


def traffic_recipes() -> dict[str, Recipe]:
    sys.path.insert(0, str(ROOT))
    from bench.traffic import recipe_of

    train = Train(steps=9, batch_size=8, micro_batch_size=2)
    changes = {
        "ZeRO-2": {"zero_stage": 2},
        "ZeRO-3": {"zero_stage": 3, "precision": "bf16"},
        "again": {"zero_stage": 3, "activation_checkpointing": True},
    }
    return {
        name: recipe_of(train.model_copy(update=change), 64, 4) for name, change in changes.items()
    }


def test_traffic_is_what_two_workers_send(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which ZeRO-3 gathers about two thirds twice a micro batch, two micro batches a
    step.
    """
    sizes = dict(zip(engines.STAGE_3, (60_000, 60_000, 3_000, 1_000), strict=True))
    sent = ranks(counted_traffic, 2, sizes)
    for name, size in sizes.items():
        monkeypatch.setitem(engines.STAGE_3, name, size)
    from bench.traffic import planned

    for name, made in traffic_recipes().items():
        expected = planned(made)
        for worker in sent:
            assert worker[name] == pytest.approx(
                expected, rel=0.03 if name != "ZeRO-2" else 1e-4
            ), name


def test_traffic_steps_and_hours_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 of a device that does 1 TFLOP/s, over links of 1 GB/s: ZeRO-3 gathers the first 1B once a
    micro batch, what is beyond twice, what is small once a step, and reduces once; activations
    computed again gather nothing more.
    """
    monkeypatch.setitem(engines.STAGE_3, "stage3_param_persistence_threshold", 0)
    model = language_model(steps=100, batch_size=32, micro_batch_size=2, zero_stage=3)
    rates = Rates("box", 1e12, 1e9, 16e9, "stated", inside=1e9, network=0.5e9)
    plan = TrainPlan(Trial(model), rates, 8)
    parameters = model.parameters("model")
    assert plan.setting == Setting(8, 2, 3)
    assert plan.traffic == pytest.approx(2 * 4 * parameters * 2 * 7 / 8), (
        "two micro batches of float32"
    )
    compute = sum(plan.row_flops.values()) * 32 / 8 / 1e12
    assert plan.step_seconds == (pytest.approx(max(compute, plan.traffic / 1e9)), "traffic")
    assert plan.hours == pytest.approx(100 * plan.traffic / 1e9 / 3600)
    assert plan.checkpoint == 16 * parameters
    slow = TrainPlan(plan.trial, replace(rates, call_s=1.0), 8)
    assert slow.step_seconds == (2 * plan.trial.calls(), "calls of operators"), "two micro batches"
    assert 100 < plan.trial.calls() < 1000, "two layers forward and backward"
    two_nodes = TrainPlan(plan.trial, rates, 16)
    assert two_nodes.step_seconds[0] == pytest.approx(2 * 4 * parameters * 15 / 16 / 0.5e9)
    monkeypatch.setitem(engines.STAGE_3, "stage3_max_live_parameters", parameters // 2)
    assert plan.traffic == pytest.approx(2.5 * 4 * parameters * 2 * 7 / 8)
    again = language_model(
        steps=100, batch_size=32, micro_batch_size=2, zero_stage=3, activation_checkpointing=True
    )
    assert TrainPlan(Trial(again), rates, 8).traffic == plan.traffic
    monkeypatch.setitem(engines.STAGE_3, "stage3_param_persistence_threshold", 64 * 64)
    small = sum(p.numel() for p in model.modules["model"].parameters() if p.numel() <= 64 * 64)
    assert 0 < small < parameters / 4
    sent = 4 * (2 * (1.5 * (parameters - small) + parameters) + small)
    assert plan.traffic == pytest.approx(sent * 7 / 8)
    monkeypatch.undo()
    half = Trial(model, 0.5)
    assert TrainPlan(half, rates, 8).flops == plan.flops / 2
    assert [half.rows(3), Trial(replace(model, packed=True), 0.3).rows(4)] == [3, 2]
    per_token = plan.row_flops["fp32"] / 32
    assert per_token == pytest.approx(
        6 * (parameters - model.modules["model"].lm.model.embed_tokens.weight.numel()), rel=0.2
    )  # type: ignore[union-attr]


def test_parts_that_are_not_trained_have_no_states_and_no_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand: 4 bytes a frozen weight, shared out by ZeRO-3; the head's loss without its weight's
    gradient; a checkpoint of 4 bytes; ZeRO-3 gathers all, and sums the gradients of the trained
    ones.
    """
    rates = Rates("box", 1e12, 1e9, 16e9, "stated")
    train = {"steps": 9, "batch_size": 32, "micro_batch_size": 2}
    whole = language_model(**train)
    model = language_model(freeze=["new_rows", "backbone"], **train)
    trained, resting = model.parameters("model"), model.frozen_in("model")
    assert model.head is not None and whole.head is not None and not model.head.trained
    assert trained + resting == whole.parameters("model")
    assert trained == sum(
        p.numel() for p in model.modules["model"].adapter.parameters() if p.requires_grad
    )  # type: ignore[union-attr]
    trial = Trial(model)
    found = trial.memory(Setting(4, 2, 0))
    assert found["states"] == 16 * trained
    outside = 4 * sum(buffer.numel() for buffer in model.modules.buffers())
    assert found["frozen"] == 4 * resting + outside
    assert trial.memory(Setting(4, 2, 3))["frozen"] == resting + outside
    gradient = 4 * whole.head.rows * whole.head.width
    assert Trial(whole).logits(2) - trial.logits(2) == gradient
    assert trial.flops()["fp32"] < 0.8 * Trial(whole).flops()["fp32"]
    plain = TrainPlan(trial, rates, 4)
    assert plain.traffic == pytest.approx(2 * 4 * trained * 3 / 4)
    assert plain.checkpoint == 12 * trained + 4 * resting
    monkeypatch.setitem(engines.STAGE_3, "stage3_param_persistence_threshold", 0)
    shared = TrainPlan(
        Trial(language_model(freeze=["new_rows", "backbone"], zero_stage=3, **train)), rates, 4
    )
    assert shared.traffic == pytest.approx((2 * trained + resting) * 4 * 4 * 3 / 4), (
        "four micro batches"
    )
    assert shared.states(3) == 20 * trained / 4


def test_what_is_offloaded_must_fit_into_main_memory() -> None:
    trial = Trial(language_model(steps=9, batch_size=32, zero_stage=3, offload="cpu", data_gb=1e-9))
    box = Rates("box", 1e12, 1e9, 16e9, "stated")
    plan = TrainPlan(trial, box, 4)
    assert plan.offloaded(plan.setting) == pytest.approx(20 * trial.model.parameters("model") / 4)
    needed = sum(plan.host(plan.setting).values())
    assert needed == plan.offloaded(plan.setting) + 2 + 5 * 8 * 32 * 64, (
        "two windows, and five batches of eight samples"
    )
    assert TrainPlan(trial, replace(box, host=needed / 0.6 + 1), 4).refusal() is None
    refusal = TrainPlan(trial, replace(box, host=needed / 1.1), 4).refusal() or ""
    assert re.search(
        r"mllm puts .* into main memory for each box .* With mllm\.train\.micro_batch_size=1 and --gpus 8",
        refusal,
    )
    nvme = language_model(
        steps=9, batch_size=32, zero_stage=3, offload="nvme", offload_path="/nvme", data_gb=1e-9
    )
    assert TrainPlan(Trial(nvme), replace(box, host=3e5), 4).refusal() is None, (
        "a disk's room is not known"
    )


def test_windows_and_batches_must_fit_into_main_memory(trials: dict[str, Trial]) -> None:
    """4 GB of shards for images, for the language model as much again for texts; batches of uint8
    pixels.
    """
    pixel = TrainPlan(trials["pixel"], Rates("box", 1e12, 1e9, 16e9, "stated", host=16e9), 2)
    size, share = pixel.model.pixels, pixel.model.train.batch_size / 2
    assert pixel.host(pixel.setting) == {
        "shards": 4e9,
        "batches": 5 * share * 3 * size**2,
        "offload": 0,
    }
    assert pixel.refusal() is None
    text = TrainPlan(trials["mllm"], replace(pixel.rates, host=10e9), 2)
    assert text.host(text.setting)["shards"] == 8e9
    refusal = text.refusal() or ""
    assert re.search(
        r"mllm puts 8 GB into main memory .*shards 8 GB.* of 10 GB .* With mllm\.train\.data_gb=2\.9 it",
        refusal,
    )
    small = text.model.train.model_copy(update={"data_gb": 2.9})
    trial = Trial.__new__(Trial)
    vars(trial).update(vars(trials["mllm"]) | {"model": replace(text.model, train=small)})
    assert TrainPlan(trial, text.rates, 2).refusal() is None, "the fix holds"
