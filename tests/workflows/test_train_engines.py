"""A parameter set anew under every ZeRO stage: before the first step, in the middle, and right after a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

PLACES = ("before the first step", "after steps", "after a checkpoint")


def set_and_step(folder: Path) -> dict[str, dict[int, torch.Tensor]]:
    """In a process of its own, since DeepSpeed holds one process group: place → ZeRO stage → the parameters after a
    step that follows `set_parameter`."""
    import torch.distributed as dist

    from smalti.schema import Train
    from smalti.workflows.train import engines

    engines.prepare_process(False, 1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def engine(stage: int):
        torch.manual_seed(1)
        train = Train(steps=9, batch_size=4, lr=0.1, zero_stage=stage)
        module = torch.nn.Linear(3, 2)
        return engines.build_engine(module, train, lr=0.1, zero_stage=stage, world_size=1, device=torch.device("cpu"))

    def step(one, count: int = 1):
        for _ in range(count):
            one.backward(one(inputs).square().mean())
            one.step()

    found: dict[str, dict[int, torch.Tensor]] = {place: {} for place in PLACES}
    for stage in range(4):
        for place in PLACES:
            one = engine(stage)
            if place != PLACES[0]:
                step(one, 3)
            if place == PLACES[2]:
                one.save_checkpoint(str(folder / str(stage)), tag="x")
                one = engine(stage)
                one.load_checkpoint(str(folder / str(stage)), tag="x")
            engines.set_parameter(one, one.module.weight, torch.arange(6.0).view(2, 3))
            step(one)
            weights = engines.full_weights(one, on_this_rank=True)
            found[place][stage] = torch.cat([weights["weight"].flatten(), weights["bias"]])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[int, torch.Tensor]]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(set_and_step, (tmp_path_factory.mktemp("engines"),))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("place", PLACES)
def test_a_set_parameter_goes_on_alike_under_every_zero_stage(found, place: str, stage: int) -> None:
    torch.testing.assert_close(found[place][stage], found[place][0], rtol=1e-5, atol=1e-6)


def test_a_set_parameter_has_its_value_and_no_moments(found) -> None:
    """Adam's first step is of the full rate in every coordinate with a gradient; with old moments it is another."""
    moved = (found[PLACES[0]][0][:6] - torch.arange(6.0)).abs()
    torch.testing.assert_close(moved, torch.full((6,), 0.1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[PLACES[1]][0], found[PLACES[2]][0])
