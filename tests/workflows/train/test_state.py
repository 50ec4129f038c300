"""Steps and checkpoints under every ZeRO stage and other numbers of workers, without Ray."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from smalti.schema import Train
from smalti.workflows.train import deepspeed_compat, guards
from smalti.workflows.train import engines as ds
from smalti.workflows.train.checkpoint_policy import CheckpointPolicy
from smalti.workflows.train.checkpoints import Checkpoints
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.task import Task

pytestmark = pytest.mark.ray

STAGES = (0, 1, 2, 3)
LOW = (0, 3)  # tried in bf16 too
BATCH, MICRO = 8, 2
TRAIN = Train(batch_size=BATCH, micro_batch_size=MICRO, lr=0.05, clip=0.5, weight_decay=0.3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        return self.body(x) * self.frozen


class Pair:
    """Two engines, as a GAN has: one of a ZeRO stage, one whole."""

    def __init__(self, stage: int, train: Train = TRAIN) -> None:
        self.ranks = Collectives()
        self.engines = {}
        for name, zero in (("model", stage), ("critic", 0)):
            torch.manual_seed(len(name))
            self.engines[name] = ds.build_engine(
                Net(),
                train,
                lr=train.lr,
                zero_stage=zero,
                world_size=self.ranks.world_size,
                device=torch.device("cpu"),
            )

    def step(self, number: int, bad: str = "") -> dict[str, float]:
        """One accumulated step on this rank's part of batch `number`; the norms.

        `bad`: what is wrong with it.
        """
        x, y = (
            torch.randn(BATCH, n, generator=torch.Generator().manual_seed(number)) for n in (5, 3)
        )
        share = BATCH // self.ranks.world_size
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        parts = list(zip(x[mine].split(MICRO), y[mine].split(MICRO), strict=True))
        for at, (x_part, y_part) in enumerate(parts):
            for name, engine in self.engines.items():
                loss = (engine(x_part) - y_part).square().mean()
                if (
                    bad == "loss"
                    and name == "model"
                    and self.ranks.rank == self.ranks.world_size - 1
                    and at == 0
                ):
                    loss = loss.detach() * 0 + float("inf") + 0 * loss
                if bad == "gradient" and name == "critic" and at == 1:
                    loss = loss + (0 * loss).sqrt()  # its value is 0, its slope infinite
                engine.backward(guards.poisoned(loss))
                if at < len(parts) - 1:
                    engine.step()
        norms = {
            name: deepspeed_compat.gradient_norm(engine) for name, engine in self.engines.items()
        }
        skip = float("inf") if float("inf") in norms.values() else 0.0
        for name, engine in self.engines.items():
            deepspeed_compat.apply(engine, norms[name] + skip)
        if not skip:
            self.engines["model"].module.seen += float(number)
        return norms

    def weights(self) -> torch.Tensor | None:
        whole = [
            ds.full_weights(engine, on_this_rank=self.ranks.rank == 0)
            for engine in self.engines.values()
        ]
        return (
            torch.cat([t.flatten() for state in whole if state for t in state.values()])
            if whole[0]
            else None
        )


class Kept(Task):
    """A task whose state is one number."""

    value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Store(LocalFileSystem):
    """`store:///folder`: an object store that several processes see.

    It keeps a list of what is fetched.
    """

    protocol = "store"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("store://"))

    def get_file(self, path: str, target: str, **settings: Any) -> None:
        with open(os.environ["FETCHED"], "a") as file:
            file.write(f"{path}\n")
        super().get_file(path, target, **settings)


fsspec.register_implementation("store", Store)


def checkpoints(
    folder: Path | str, stage: int, ranks: Collectives, lines: list[str] | None = None
) -> Checkpoints:
    say = [].append if lines is None else lines.append
    return Checkpoints(f"{folder}/zero{stage}", ranks, CheckpointPolicy(), say=say)


def damage(folder: Path, part: str) -> None:
    """Turn a bit in the middle of a file of the newest checkpoint in `folder`."""
    newest = max(folder.glob("step-*"))
    (file,) = [path for path in newest.rglob("*.pt") if part in path.name][:1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def two_ranks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "norms": {},
        "skipped": {},
        "low": {},
        "drift": {},
        "saved": {},
        "resumed": {},
    }
    found["compared"] = {}
    for stage in STAGES:
        pair = Pair(stage)
        found["norms"][stage] = pair.step(0)
        pair.step(1)
        before = pair.weights()
        bad = [pair.step(9, bad="loss"), pair.step(9, bad="gradient")]
        after = pair.weights()
        pair.step(2)
        found["skipped"][stage] = (bad, before, after, pair.weights())
    for stage in LOW:
        low = Pair(stage, TRAIN.model_copy(update={"precision": "bf16"}))
        low.step(0)
        before = low.weights()
        low.step(9, bad="loss")
        after = low.weights()
        low.step(2)
        found["low"][stage] = (before, after, low.weights())
    for stage in STAGES:
        pair, task = Pair(stage), Kept()
        pair.step(0)
        pair.step(1)
        task.value = 7
        kept = checkpoints(folder, stage, pair.ranks)
        kept.save(pair.engines, task, {"step": 2, "history": []})
        pair.step(2)
        pair.step(3)
        kept.wait()
        found["saved"][stage] = pair.weights()
        dist.barrier()
        again, empty = Pair(stage), Kept()
        state = kept.load(again.engines, empty)
        again.step(2)
        again.step(3)
        found["resumed"][stage] = (state["step"], empty.value, again.weights())
    ds.STAGE_3["stage3_param_persistence_threshold"] = 30
    for stage in STAGES:
        found["compared"][stage], found["drift"][stage] = drifting(Pair(stage))
    return found


def slow_storage() -> str:
    """What worker 0 meets that waits for the other's storage where collectives give up after a
    tenth of a second.
    """
    ranks = Collectives()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.1), dist.group.WORLD)
    if ranks.rank:
        time.sleep(0.5)
    ranks.storage_barrier()
    if not ranks.rank:
        try:
            ranks.barrier()  # the other never comes
        except RuntimeError as error:
            return str(error)
    return ""


def drifting(pair: Pair) -> tuple[list[str], list[str]]:
    """What is compared after a step, and the errors when one tensor after the other differs on
    rank 1.
    """
    pair.step(0)
    compared = guards.replicated(pair.engines)
    errors: list[str] = []
    guards.check_same(compared, pair.ranks, 4)
    for name, tensor in compared.items():
        before = tensor.detach().clone()
        tensor.detach().flatten()[-1] += pair.ranks.rank
        try:
            guards.check_same(guards.replicated(pair.engines), pair.ranks, 5)
        except guards.DriftError as error:
            errors.append(f"{name}: {error}")
        tensor.detach().copy_(before)
    return list(compared), errors


def resume(folder: Path | str, fetched: str = "") -> dict[int, Any]:
    """From the newest checkpoint two steps on, saved, and two more: the state found, and the
    weights after them.
    """
    os.environ["FETCHED"] = fetched
    if fetched:
        tempfile.tempdir = f"{fetched}-tmp"
        os.makedirs(tempfile.tempdir, exist_ok=True)
    found: dict[int, Any] = {}
    for stage in STAGES:
        pair, task = Pair(stage), Kept()
        kept = checkpoints(folder, stage, pair.ranks)
        first = kept.load(pair.engines, task)["step"]
        weights = []
        for step in (first, first + 2):
            pair.step(step)
            pair.step(step + 1)
            weights.append(pair.weights())
            if step == first:
                kept.save(pair.engines, task, {"step": step + 2, "history": []})
        kept.wait()
        dist.barrier()
        found[stage] = (first, task.value, weights)
    return found


def load_damaged(folder: Path) -> list[Any]:
    """The step that is resumed from, and the lines logged, after a file of worker 1 was damaged."""
    pair, task = Pair(3), Kept()
    lines: list[str] = []
    state = checkpoints(folder, 3, pair.ranks, lines).load(pair.engines, task)
    return [state["step"], lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(ranks, folder) -> list[dict[str, Any]]:
    return ranks(two_ranks, 2, folder)


@pytest.fixture(scope="module")
def one(ranks, two, folder) -> dict[int, Any]:
    """What one worker makes of the checkpoints of two."""
    return ranks(resume, 1, folder)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_norm_is_that_of_the_whole_batch(two, stage: int) -> None:
    torch.manual_seed(len("model"))
    net = Net()
    x, y = (torch.randn(BATCH, n, generator=torch.Generator().manual_seed(0)) for n in (5, 3))
    (net(x) - y).square().mean().backward()
    expected = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
    for rank in two:
        assert rank["norms"][stage]["model"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_moves_no_engine_on_any_rank(two, stage: int) -> None:
    """A loss of one rank's first micro batch, and a gradient of the second engine alone; the steps
    after are those of a run without the bad ones.
    """
    (loss, gradient), before, after, last = two[0]["skipped"][stage]
    assert loss["model"] == float("inf") and loss["critic"] < float("inf")
    assert gradient["critic"] == float("inf") and gradient["model"] < float("inf")
    assert two[1]["skipped"][stage][0] == [loss, gradient]
    assert torch.equal(before, after)
    assert not torch.equal(after, last) and bool(torch.isfinite(last).all())
    torch.testing.assert_close(last, two[0]["skipped"][0][3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", LOW)
def test_a_step_in_bf16_that_is_not_finite_moves_nothing(two, stage: int) -> None:
    before, after, last = two[0]["low"][stage]
    assert torch.equal(before, after)
    assert not torch.equal(after, last) and bool(torch.isfinite(last).all())


@pytest.mark.parametrize("stage", STAGES)
def test_replicated_tensors_are_compared_and_named_where_they_differ(two, stage: int) -> None:
    """Every weight and buffer of both engines; under ZeRO-3 all but the matrix of 35 numbers, of
    which 30 may stay whole.
    """
    names = dict(Net().named_parameters()) | dict(Net().named_buffers())
    expected = {f"{engine}'s {name}" for engine in ("model", "critic") for name in names}
    expected -= {"model's body.0.weight"} if stage == 3 else set()
    for rank in two:
        assert set(rank["compared"][stage]) == expected
        for name, error in zip(rank["compared"][stage], rank["drift"][stage], strict=True):
            where = "must be the same on all 2 workers, and after step 5 it differs on rank(s) 1"
            assert error.startswith(f"{name}: {name} {where}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_unbroken_one(two, stage: int) -> None:
    step, value, weights = two[0]["resumed"][stage]
    assert (step, value) == (2, 7)
    assert torch.equal(weights, two[0]["saved"][stage])


def test_fewer_workers_resume_equally(two, one, folder) -> None:
    """ZeRO through a universal checkpoint: weights, moments, their counts and decays, buffers."""
    for stage, (step, value, weights) in one.items():
        assert (step, value) == (2, 7)
        torch.testing.assert_close(weights[0], two[0]["saved"][stage], rtol=1e-5, atol=1e-6)
    assert sorted(os.listdir(folder / "zero1")) == ["step-000000002", "step-000000004"]


def test_more_workers_resume_equally_and_skip_what_is_damaged(ranks, one, folder) -> None:
    """Two workers of a machine take the four-step checkpoint of one out of a store, and each file
    once; then theirs is damaged, and the one before is taken.
    """
    written = sorted(
        str(path)
        for path in folder.glob("*/*000004/**/*")
        if path.is_file() and "manifest" not in path.name
    )
    for stage, (step, value, weights) in ranks(
        resume, 2, f"store://{folder}", str(folder / "fetched")
    )[0].items():
        assert (step, value) == (4, 7)
        torch.testing.assert_close(weights[0], one[stage][2][1], rtol=1e-5, atol=1e-6)
    assert sorted((folder / "fetched").read_text().split()) == written
    assert not list((folder / "fetched-tmp").glob("smalti-*"))
    damage(folder / "zero3", "rank_1")
    (step, lines), other = ranks(load_damaged, 2, folder)
    assert step == other[0] == 4
    assert lines == other[1] and len(lines) == 1
    assert (
        "skipping the checkpoint " in lines[0]
        and "step-000000006: " in lines[0]
        and "rank_1" in lines[0]
        and "is damaged" in lines[0]
    )


def test_workers_wait_longer_for_storage_than_for_other_collectives(ranks) -> None:
    error, _ = ranks(slow_storage, 2)
    assert "imed out" in error
