"""The plan of trained stages: against memory measured on real tensors, DeepSpeed's engines and
estimators, and by hand.

Covers: smalti/cli/plan.py, workflows/cluster/gpu_specs.py, workflows/plan/configs.py,
workflows/plan/devices.py, workflows/plan/fixes.py,
workflows/plan/flops.py, workflows/plan/trial.py,
workflows/plan/inference_cost.py,
workflows/plan/models.py, workflows/plan/table.py, workflows/plan/trace.py,
workflows/recipe_plan.py.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from smalti.cli import main
from smalti.config import load_recipe
from smalti.errors import ConfigError
from smalti.mllm.losses import PART
from smalti.schema import (
    FeaturesSection,
    LanguageModel,
    Lora,
    MllmSection,
    Recipe,
    Resources,
    Train,
)
from smalti.tokenizers.encoders import VisionEncoder
from smalti.workflows.cluster.gpu_specs import bf16_peak
from smalti.workflows.plan import language_tasks
from smalti.workflows.plan.base import Rates, gpu_rates
from smalti.workflows.plan.configs import language_config, vision_config
from smalti.workflows.plan.devices import shared_among
from smalti.workflows.plan.inference_cost import InferenceCost
from smalti.workflows.plan.models import Model
from smalti.workflows.plan.trace import trace
from smalti.workflows.plan.training import TrainPlan
from smalti.workflows.plan.trial import Setting, Trial, states
from smalti.workflows.systems.registry import system_of
from smalti.workflows.train import engines
from smalti.workflows.train.memory import blocks_of, recompute

SMALL = [
    "encoder.train.layers=1", "encoder.train.train.precision=bf16", "tokenizer.semantic.decoder_layers=1",
    "tokenizer.pixel.encoder.layers=1", "tokenizer.pixel.decoder.layers=1", "tokenizer.pixel.loss.gan.weight=0.5",
    "tokenizer.pixel.loss.gan.start_step=0", "tokenizer.pixel.loss.gan.channels=16",
    "tokenizer.pixel.loss.perceptual.kind=encoder", "mllm.train.precision=bf16", "mllm.config.layers=1", "mllm.max_length=128",
    "mllm.loss_chunk=64",
]  # fmt: skip
BATCH, ROOT = 4, Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("semhitok-quickstart", SMALL)


@pytest.fixture(scope="module")
def trials(recipe: Recipe) -> dict[str, Trial]:
    return {model.name: Trial(model) for model in system_of(recipe).planned_models(recipe)}


@pytest.fixture(scope="module")
def measured(recipe: Recipe) -> dict[str, Any]:
    """What bench/real_steps.py measures of each stage."""
    sys.path.insert(0, str(ROOT))
    from bench.real_steps import measure

    return dict(measure(recipe, BATCH))


@pytest.mark.parametrize("name", ["encoder", "semantic", "pixel", "mllm"])
def test_memory_is_what_real_tensors_take(
    name: str, trials: dict[str, Trial], measured: dict[str, Any]
) -> None:
    stays, passing, _ = measured[name]
    planned = trials[name].memory(Setting(1, BATCH, 0))
    head = trials[name].model.head
    if head is not None:  # a CPU adds bf16 to float32 by way of a float32 copy; a GPU makes none
        passing -= 4 * min(head.rows * head.width, PART)
    assert planned["states"] + planned["frozen"] == pytest.approx(stays, rel=0.02)
    assert planned["activations"] + planned["logits"] == pytest.approx(passing, rel=0.15)


def test_activations_computed_again_are_traced_too(
    trials: dict[str, Trial], recipe: Recipe, measured: Any
) -> None:
    """The semantic stage, in float32, with each block of its decoder run again on the way back."""
    from bench.real_steps import peak_of, real_step

    model = next(
        model for model in system_of(recipe).planned_models(recipe) if model.name == "semantic"
    )
    modules = model.modules.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*modules.parameters(), *modules.buffers()]:
            tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    for block in blocks_of(modules["model"]):
        recompute(block)
    step = real_step(model, BATCH)
    step()
    whole, again = (
        trials["semantic"].memory(Setting(1, BATCH, 0, on))["activations"] for on in (False, True)
    )
    assert again == pytest.approx(peak_of(step), rel=0.15)
    assert again < whole
    assert trials["semantic"].flops(True)["fp32"] > 1.02 * trials["semantic"].flops()["fp32"]


def engine_bytes(folder: str) -> dict[int, int]:
    """ZeRO stage → bytes of all tensors of a process that trains a small model in an engine of this
    stage.
    """
    import torch.distributed as dist

    engines.prepare_process(False, 1)
    engines.REDUCE_BUCKET = 1000  # buckets are buffers, not states
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    found = {}
    for stage in range(4):
        module = nn.Sequential(nn.Linear(500, 1000), nn.Linear(1000, 500))
        train = Train(steps=9, batch_size=1, zero_stage=stage)
        engine = engines.build_engine(
            module, train, lr=1e-3, zero_stage=stage, world_size=1, device=torch.device("cpu")
        )
        for _ in range(2):
            engine.backward(engine(torch.randn(4, 500)).square().mean())
            engine.step()
        engine.backward(engine(torch.randn(4, 500)).square().mean())
        alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
        found[stage] = sum(alive.values())
        engine.destroy()
        del engine, module
        gc.collect()
    return found


def _tensors() -> list[Tensor]:
    found = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    return found + [item.grad for item in found if item.is_leaf and item.grad is not None]


def estimates(parameters: int, largest: int) -> dict[tuple[int, int, int], tuple[int, int]]:
    """(ZeRO stage, GPUs a node, nodes) → bytes a GPU by DeepSpeed's estimator, and those of the
    gathered layer in it.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    found = {}
    for gpus, nodes in ((8, 1), (8, 4), (8, 16)):
        _, size, gathered = zero3(
            parameters, largest, gpus, nodes, cpu_offload=False, cpu_offload_params=False
        )
        found[3, gpus, nodes] = size, gathered
        found[2, gpus, nodes] = zero2(parameters, gpus, nodes, cpu_offload=False)[1], 0
    return found


def in_deepspeed(folder: str) -> tuple[Any, Any]:
    return engine_bytes(folder), estimates(8_000_000_000, 1_000_000_000)


@pytest.fixture(scope="module")
def deepspeeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """In a process of its own: what engines hold, and what the estimators say."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(in_deepspeed, (str(tmp_path_factory.mktemp("engines")),))


def test_states_are_what_the_engines_hold(deepspeeds: tuple[Any, Any]) -> None:
    parameters = 500 * 1000 * 2 + 1500
    for stage, held in deepspeeds[0].items():
        assert held == pytest.approx(states(parameters, stage, 1), rel=0.1), f"ZeRO-{stage}"


def test_states_against_deepspeeds_estimators(deepspeeds: tuple[Any, Any]) -> None:
    """They take 16-bit weights beside float32 copies.

    Ours are float32: 2 bytes more a weight wherever it lies, and under ZeRO-2 no second gradient of
    16 bits (2 bytes a parameter, shared out).
    """
    parameters = 8_000_000_000
    for (stage, gpus, nodes), (theirs, gathered) in deepspeeds[1].items():
        num = gpus * nodes
        more = 2 * parameters - 2 * parameters / num if stage == 2 else 2 * parameters / num
        assert states(parameters, stage, num) == pytest.approx(theirs - gathered + more, rel=1e-6)


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


def test_low_rank_updates_are_what_is_trained_of_a_backbone() -> None:
    model = language_model(
        lora=Lora(rank=4, targets=["q_proj"]), freeze=["new_rows", "adapter"], steps=9, batch_size=8
    )
    assert model.parameters("model") == 2 * (64 * 4 + 4 * 64), "two layers of width 64"
    assert Trial(model).memory(Setting(1, 1, 0))["states"] == 16 * 1024


def test_a_number_of_devices_that_a_batch_does_not_divide_among_names_the_option(
    trials: dict[str, Trial],
) -> None:
    """Batches of 32, 64, 32 and 16."""
    models = [trial.model for trial in trials.values()]
    told = (
        r"--gpus=3: encoder\.train\.train\.batch_size=32, .*mllm\.train\.batch_size=16 cannot be shared evenly by 3 devices\. "
        r"Set --gpus to 2 or 4, or each of these batch sizes to a multiple of 3\."
    )
    with pytest.raises(ConfigError, match=told):
        shared_among(models, Resources(), 3)
    with pytest.raises(
        ConfigError, match=r"--gpus=32: mllm\.train\.batch_size=16 .*Set --gpus to 16, or mllm"
    ):
        shared_among(models, Resources(), 32)
    with pytest.raises(
        ConfigError, match=r"resources\.workers=3: .* Set resources\.workers to 2 or 4"
    ):
        shared_among(models, Resources(workers=3), None)
    assert shared_among(models, Resources(workers=(1, 3)), None) == 2, (
        "as many as can share a batch"
    )
    assert shared_among(models, Resources(workers=(1, 3)), 8) == 8


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


def test_muon_keeps_one_moment_without_zero_alone() -> None:
    """Under ZeRO it does not run: those columns are AdamW's."""
    model = language_model(steps=9, batch_size=32, optimizer="muon")
    trial, parameters = Trial(model), model.parameters("model")
    assert trial.states("model", 0, 64) == 16 * parameters - 4 * model.muon("model")
    assert [trial.states("model", stage, 64) for stage in (1, 2, 3)] == [
        states(parameters, s, 64) for s in (1, 2, 3)
    ]


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


def test_memory_of_stages_that_train_nothing() -> None:
    """Five images by the figures of one and two, against a pass of five; what does not fit names
    the largest batch.
    """
    section = FeaturesSection(batch_size=5)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    encoder = VisionEncoder(
        SiglipVisionModel(SiglipVisionConfig(**size, image_size=32, patch_size=8))
    )
    weights = 4 * sum(t.numel() for t in (*encoder.parameters(), *encoder.buffers()))
    modules = nn.ModuleDict({"encoder": encoder})
    look = InferenceCost.of(section, modules, [encoder], [encoder], 32)

    def step(backward: Any, autocast: Any) -> None:
        with torch.no_grad():
            encoder(torch.empty(5, 3, 32, 32))

    assert look.memory == pytest.approx(weights + trace(modules, step, bf16=False).peak)
    box = Rates(
        "box",
        1e12,
        1e9,
        (weights + look.first + 2.5 * look.further) / 0.92,
        "stated",
        {"fp32": 1e12},
    )
    assert (look.refusal("features", box) or "").endswith("Set features.batch_size=3.")
    assert look.refusal("features", gpu_rates("a100")) is None


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen/Qwen2.5-0.5B", 0.494), ("Qwen/Qwen2.5-7B-Instruct", 7.616)]
)
def test_sizes_of_public_language_models(name: str, billions: float) -> None:
    """Their model cards say 0.49B and 7.61B; the tests run without the hub, so the table speaks."""
    from transformers import AutoModelForCausalLM

    config, tokens, origin = language_config(name)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert tokens == 151_665
    assert "table of public models" in origin


def test_sizes_of_public_encoders() -> None:
    config, origin = vision_config("google/siglip-so400m-patch14-384")
    assert (
        config.hidden_size,
        config.image_size // config.patch_size,
        config.num_hidden_layers,
    ) == (1152, 27, 27)
    assert "table of public models" in origin
    with pytest.raises(
        Exception, match=r"encoder\.pretrained=acme/none: its config cannot be read from the hub"
    ):
        vision_config("acme/none")


def test_a_gpu_without_bf16_is_planned_at_its_float32_rate() -> None:
    assert gpu_rates("v100").training("bf16") == gpu_rates("v100").training("fp32")
    assert gpu_rates("h100").training("bf16") > 10 * gpu_rates("h100").training("fp32")
    assert "CUDA 13" in gpu_rates("V100").note and not gpu_rates("A100").note


def test_cards_of_one_name_have_peaks_of_their_own() -> None:
    """Names as torch gives them."""
    names = (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200",
        "NVIDIA A100 80GB PCIe",
    )
    assert [bf16_peak(name) for name in names] == [989e12, 756e12, 835e12, 989e12, 312e12]
    assert bf16_peak("NVIDIA GeForce RTX 4090") is None


def test_the_command_prints_every_stage_and_refuses_what_cannot_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = [
        "plan",
        "semhitok-quickstart",
        f"out={tmp_path}",
        *SMALL,
        "--gpu",
        "a100",
        "--gpus",
        "2",
    ]
    asked += [
        "codebook.size=500000",
        "codebook.coarse=1000",
        "--vectors",
        "150e6",
        "--width",
        "1152",
        "--length",
        "100",
        "tokenizer.pixel.codes=32",
    ]
    assert main([*asked, "mllm.train.batch_size=65536", "mllm.train.micro_batch_size=32768"]) == 1
    seen = capsys.readouterr()
    assert re.search(r"features +.* GPU-hours; .* per GPU for \d+ images", seen.out)
    for part in (
        "encoder:",
        "semantic:",
        "pixel:",
        "mllm:",
        "storage:",
        "states per GPU",
        "GPU-hours",
        "ASSUMED",
    ):
        assert part in seen.out
    assert "N = 150,000,000 vectors x C = 1,152 -> K = 500,000 codes in P = 1,000 cells" in seen.out
    assert re.search(
        r"cannot fit:\n  mllm needs .*With mllm\.train\.optimizer=adamw and .*, and fits\.",
        seen.err,
    )
    assert main([*asked, "--gpus", "0"]) == 2
    assert "--gpus: expected a number of at least 1" in capsys.readouterr().err
