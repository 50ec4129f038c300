"""Memory of trained models: against real tensors, DeepSpeed's engines and estimators, and by hand."""

from __future__ import annotations

import gc
import multiprocessing
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smalti.mllm.losses import PART
from smalti.schema import Lora, Recipe, Train
from smalti.workflows.plan.trial import Setting, Trial, states
from smalti.workflows.systems.registry import system_of
from smalti.workflows.train import engines
from smalti.workflows.train.memory import blocks_of, recompute
from tests.workflows.plan.small_plans import BATCH, language_model


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


def test_low_rank_updates_are_what_is_trained_of_a_backbone() -> None:
    model = language_model(
        lora=Lora(rank=4, targets=["q_proj"]), freeze=["new_rows", "adapter"], steps=9, batch_size=8
    )
    assert model.parameters("model") == 2 * (64 * 4 + 4 * 64), "two layers of width 64"
    assert Trial(model).memory(Setting(1, 1, 0))["states"] == 16 * 1024


def test_muon_keeps_one_moment_without_zero_alone() -> None:
    """Under ZeRO it does not run: those columns are AdamW's."""
    model = language_model(steps=9, batch_size=32, optimizer="muon")
    trial, parameters = Trial(model), model.parameters("model")
    assert trial.states("model", 0, 64) == 16 * parameters - 4 * model.muon("model")
    assert [trial.states("model", stage, 64) for stage in (1, 2, 3)] == [
        states(parameters, s, 64) for s in (1, 2, 3)
    ]
