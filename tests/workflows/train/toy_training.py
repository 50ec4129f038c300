"""A small task with two engines, a codebook that follows all ranks' statistics, and dropout; and
runs of it.

Also a script: `python toy_training.py PATH` trains with slow steps, for the tests that kill it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from smalti.errors import DataError
from smalti.schema import Recipe, Resources, Train
from smalti.tracking import NullTracker
from smalti.workflows.train.task import Task

SIZES = [7, 5, 9, 20]
TRAIN = Train(
    steps=24,
    batch_size=8,
    lr=1e-2,
    warmup=3,
    checkpoint_every=8,
    log_every=4,
    check_every=4,
    max_failures=2,
)


class Rows:
    sizes = SIZES

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def read(self, shard: int, row: int):
        if self.broken and (shard, row) == (1, 2):
            raise DataError("shard train/00001 is torn: make the corpus again.")
        return f"train/{shard:05d}", {"x": shard * 100 + row}


class Net(nn.Module):
    """A regression with a running mean of its hidden units; dropout draws from the step's seed."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(32, 1)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x):
        hidden = self.body(x)
        return self.head(hidden), hidden.detach().mean(0)


class Toy(Task):
    def __init__(
        self,
        slow_s=0.0,
        broken=False,
        nan_from=99,
        die_at=-1,
        dropout=0.0,
        flag="",
        record="",
        saved="",
    ):
        self.slow_s, self.broken, self.nan_from, self.die_at = slow_s, broken, nan_from, die_at
        self.dropout, self.flag, self.record, self.saved = dropout, flag, record, saved

    def source(self):
        return Rows(self.broken)

    def setup(self, context):
        super().setup(context)
        self.net, self.critic = (
            Net(self.dropout),
            nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, 1)),
        )
        self.moved: list[torch.Tensor] = []
        self.calls = 0

    def modules(self):
        return {"model": self.net, "discriminator": self.critic}

    def zero_stage(self, name):
        return 0 if name == "discriminator" else super().zero_stage(name)

    def make_batch(self, rows):
        x = np.stack([row.random(self.context.seed).standard_normal(8) for row in rows])
        y = [[row.values["x"] / 300.0] for row in rows]
        places = [[row.index, row.epoch, int(row.values["x"])] for row in rows]
        return {
            "x": torch.tensor(x, dtype=torch.float32),
            "y": torch.tensor(y, dtype=torch.float32),
            "places": places,
        }

    def begin_step(self, step, engines, read):
        flag = Path(self.flag or "/nonexistent")
        if not self.flag or flag.exists():
            time.sleep(self.slow_s)
        if step == self.die_at and self.context.collectives.rank == 0 and flag.exists():
            flag.unlink()
            while (
                self.saved
                and len(list(Path(self.saved).glob("manifest-*")))
                < self.context.collectives.world_size
            ):
                time.sleep(0.05)  # a checkpoint is sent by a thread
            os.kill(os.getpid(), 9)

    def loss(self, name, engines, batch, step, share):
        self.calls += 1
        if name == "discriminator":
            if step < 10:  # the second engine starts late, as a GAN's does
                return None
            loss = (engines[name](self.out) - batch["y"]).pow(2).mean()
            return loss, {"critic": loss.detach()}
        if self.record:  # one write of one line: whole, also beside other workers'
            with open(self.record, "a") as file:
                file.write(json.dumps({"step": step, "places": batch["places"]}) + "\n")
        out, moved = engines[name](batch["x"])
        self.out = out.detach()
        self.moved.append(moved)
        loss = (out - batch["y"]).pow(2).mean()
        if step >= self.nan_from and self.context.collectives.rank == 0:
            loss = loss * float("nan")
        return loss, {"loss": loss.detach()}

    def after_step(self, step, engines):
        c = self.context.collectives
        mean = c.all_reduce(torch.stack(self.moved).mean(0)) / c.world_size
        self.moved.clear()
        self.net.mean.lerp_(mean, 0.1)
        return {"moved": mean.norm()}

    def skipped(self, step):
        self.moved.clear()

    def amount(self, batch):
        return "numbers", float(batch["x"].numel())

    def pictures(self, engines):
        return {"square": np.zeros((4, 4, 3), np.uint8)}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]

    def save(self, path, weights):
        torch.save(weights, os.path.join(path, "final.pt"))
        return {"calls": float(self.calls)}


def check_record(path: str, steps: int, batch_size: int) -> int:
    """Assert that every step had the samples of its place in the run, however often it was taken,
    and that each row of an epoch came exactly once; the number of steps that were taken again.
    """
    taken: dict[int, list[list[int]]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        taken.setdefault(row["step"], []).extend(row["places"])
    assert sorted(taken) == list(range(steps))
    by_index: dict[int, tuple[int, int]] = {}
    for step, places in taken.items():
        assert {index for index, *_ in places} == set(
            range(step * batch_size, (step + 1) * batch_size)
        ), step
        for index, epoch, row in places:
            assert by_index.setdefault(index, (epoch, row)) == (epoch, row), index
    every = {shard * 100 + row for shard, size in enumerate(SIZES) for row in range(size)}
    for epoch in range(steps * batch_size // len(every)):
        rows = [row for at, row in by_index.values() if at == epoch]
        assert len(rows) == len(every) and set(rows) == every, epoch
    return sum(len(places) > batch_size for places in taken.values())


class FakeRun:
    """What `fit` needs of a stage at work; keeps what was logged."""

    def __init__(self, path: str, workers: int | tuple[int, int] = 1) -> None:
        self.name, self.path, self.tracker, self.lines = "toy", path, NullTracker(), []
        self.recipe = Recipe(resources=Resources(workers=workers))
        os.makedirs(path, exist_ok=True)

    def log(self, message: str) -> None:
        self.lines.append(message)
        print(message, file=sys.stderr)


def train(
    path: str, *, workers: int | tuple[int, int] = 1, settings=None, run=None, **changes
) -> dict[str, float]:
    """Train the toy into `path`; Ray must run."""
    from smalti.workflows.train.launch import fit

    by_value()
    run = run or FakeRun(path, workers)
    return fit(
        sys.modules[Toy.__module__].Toy,
        settings or {},
        TRAIN.model_copy(update=changes),
        run,
        seed=3,
    )


def _in_turn(jobs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """In a worker: one training after the other; the final numbers of each."""
    from smalti.workflows.train import engines
    from smalti.workflows.train.loop import Loop

    engines.prepare_process(False, 1)
    return {name: Loop(job).run() for name, job in jobs.items()}


def train_in_turn(
    path: str, workers: int, variants: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Train the toy once for each variant, into `<path>/<name>`, all in one group of workers:
    starting one takes longer than the training.

    The final numbers by name.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from smalti.workflows.train.driver_channel import DriverChannel
    from smalti.workflows.train.job import TrainingJob

    by_value()
    channel = ray.remote(num_cpus=0)(DriverChannel).remote()
    jobs = {}
    for name, changes in variants.items():
        own = os.path.join(path, name)
        os.makedirs(own)
        jobs[name] = TrainingJob(
            sys.modules[Toy.__module__].Toy,
            {},
            TRAIN.model_copy(update=changes),
            3,
            own,
            1,
            0,
            channel,
            resumable=False,
        )
    trainer = TorchTrainer(
        _in_turn,
        train_loop_config=jobs,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name="in-turn", storage_path=path),
    )
    return trainer.fit().return_value


def by_value() -> None:
    """Let workers get this module's classes, which they cannot import."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[Toy.__module__])


def load_by_path(path: str):
    """This file as a module (tests are no package)."""
    spec = importlib.util.spec_from_file_location("toy_training", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_training"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    from smalti.workflows.cluster.session import ensure_ray

    asked = {"slow_s": float(sys.argv[2]), "dropout": 0.5}
    changes = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    if changes:  # the benchmark of kills: without dropout, and with a record
        asked |= {"dropout": 0.0, "record": f"{sys.argv[1]}/record"}
    with ensure_ray(Recipe()):
        train(sys.argv[1], settings=asked, **changes)
