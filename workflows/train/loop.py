"""The one training loop, as each Ray Train worker runs it: DeepSpeed engines, checkpoints, metrics, final weights.

Everything that a step depends on is a function of (seed, step) or lies in the checkpoint, so a resumed run takes the
same steps as an unbroken one.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smalti import storage
from smalti.errors import SmaltiError, TrainingError
from smalti.workflows.train import checkpoints
from smalti.workflows.train import engines as ds
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.data import Feed
from smalti.workflows.train.order import Order
from smalti.workflows.train.task import Batch, Context, Metrics, Task, seed_of

if TYPE_CHECKING:
    from smalti.schema import Train

HISTORY_FILE = "history.jsonl"
DONE_FILE = "trained.json"


@dataclass(frozen=True)
class Job:
    """What a worker is told: plain values that travel. `task` is `module:Class` or a class, made with `settings`;
    `board` the handle of the Board actor; not `resumable`: no checkpoints are written or looked for."""

    task: str | type[Task]
    settings: dict[str, Any]
    train: Train
    seed: int
    path: str
    cpus: int
    gpus: float
    board: Any
    resumable: bool = True

    def make_task(self) -> Task:
        if not isinstance(self.task, str):
            return self.task(**self.settings)
        module, _, name = self.task.partition(":")
        return getattr(importlib.import_module(module), name)(**self.settings)


class Meter:
    """Means of named numbers over micro batches, steps and workers, kept on the device until they are asked for.

    A number may come as (mean, count): then means are weighed by their counts, and one that counted nothing is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        """Add numbers; scalar tensors stay where they are."""
        for name, value in metrics.items():
            mean, weight = value if isinstance(value, tuple) else (value, 1.0)
            weight = torch.as_tensor(weight, device=self.device, dtype=torch.float64).detach()
            mean = torch.as_tensor(mean, device=self.device, dtype=torch.float64).detach()
            pair = torch.stack([mean * weight, weight])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self, collectives: Collectives) -> dict[str, float]:
        """Means over all workers since the last call; every worker must have added the same names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = collectives.all_reduce(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums = {}
        return {name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight}


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a Ray Train worker. Returns {"metrics", "fatal"}.

    What the user must mend (a SmaltiError) is not tried again and again. Where every worker meets it in the same place
    it is returned as `fatal`. Otherwise it is told to the board and raised, which ends the other workers; Ray starts
    the group once more, and that returns it at once.
    """
    import ray
    import ray.train

    job: Job = config["job"]
    fatal = ray.get(job.board.fatal.remote())
    if fatal is not None:
        return {"metrics": {}, "fatal": fatal}
    ds.prepare_process(job.gpus > 0, job.cpus)
    try:
        return {"metrics": Loop(job).run(), "fatal": None}
    except SmaltiError as error:
        if isinstance(error, NotFiniteError) or ray.train.get_context().get_world_size() == 1:
            return {"metrics": {}, "fatal": error}
        ray.get(job.board.fail.remote(error))
        raise


class NotFiniteError(TrainingError):
    """The loss is NaN or infinite; all workers find out in the same step."""


class Loop:
    """One training run on one worker. `run()` returns the final numbers on rank 0, {} elsewhere."""

    def __init__(self, job: Job) -> None:
        import ray.train.torch

        self.job, self.train = job, job.train
        self.collectives = Collectives()
        self.rank, self.world_size = self.collectives.rank, self.collectives.world_size
        self.device = ray.train.torch.get_device() if job.gpus > 0 else torch.device("cpu")
        self.micro, self.accumulation = ds.accumulation(self.train, self.world_size)
        self.meter = Meter(self.device)
        self.history: list[dict[str, float]] = []
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)

    def run(self) -> dict[str, float]:
        """Train from the newest checkpoint, or from nothing, to the last step; then write the final model."""
        torch.manual_seed(self.job.seed)
        self.task = self.job.make_task()
        self.task.setup(Context(self.device, self.collectives, self.job.seed, self.train))
        self.engines = {name: self._engine(name, module) for name, module in self.task.modules().items()}
        source = self.task.source()
        order = Order(source.sizes, self.job.seed, self.train.data_window)
        self.feed = Feed(
            source,
            order,
            self.task.make_batch,
            batch_size=self.train.batch_size,
            micro=self.micro,
            rank=self.rank,
            world_size=self.world_size,
            threads=self.job.cpus,
        )
        start = self._resume()
        if self.rank == 0:
            self.job.board.started.remote(start)
        self.clock = (time.monotonic(), start)
        for step, batches in self.feed.steps(start, self.train.steps):
            self._step(step, batches)
            self._after(step)
        return self._finish()

    def _engine(self, name: str, module: torch.nn.Module) -> Any:
        return ds.build_engine(
            module,
            self.train,
            lr=self.task.peak_lr(name),
            zero_stage=self.task.zero_stage(name),
            world_size=self.world_size,
            device=self.device,
        )

    # One step

    def _step(self, step: int, batches: list[Batch]) -> None:
        """All micro batches of a step, each engine in turn."""
        torch.manual_seed(seed_of(self.job.seed, 5, step, self.rank))
        self.task.begin_step(step, self.engines, self._read)
        for name, engine in self.engines.items():
            engine.train()
            ds.set_learning_rate(engine, ds.learning_rate(self.train, step, self.task.peak_lr(name)))
        moved = [self._to_device(batch) for batch in batches]
        share = self._share(moved)
        for batch in moved:
            for name, engine in self.engines.items():
                result = self.task.loss(name, self.engines, batch, step, share)
                if result is None:
                    continue
                loss, metrics = result
                first_bad = (self.bad_step < 0) & ~torch.isfinite(loss.detach())
                self.bad_step = torch.where(first_bad, torch.full_like(self.bad_step, step), self.bad_step)
                engine.backward(loss)
                engine.step()
                self.meter.add(metrics)
        self.meter.add(self.task.after_step(step, self.engines))

    def _share(self, batches: list[Batch]) -> Tensor | None:
        """Counts of the whole step, over micro batches and workers, divided by the number of micro batches."""
        counts = [self.task.totals(batch) for batch in batches]
        present = [count for count in counts if count is not None]
        if not present:
            return None
        total = self.collectives.all_reduce(torch.stack(present).sum(0).to(self.device))
        return total / (len(batches) * self.world_size)

    def _read(self, step: int) -> list[Batch]:
        return [self._to_device(batch) for batch in self.feed.at(step)]

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in pinned.items()}

    # After a step: log, pictures, checkpoint

    def _after(self, step: int) -> None:
        done, train = step + 1, self.train
        last = done == train.steps
        saving = done % train.checkpoint_every == 0 or last
        if done % train.log_every == 0 or last or saving or self.device.type == "cpu":
            self._check_finite(step)
        if done % train.log_every == 0 or last:
            self._log(done)
        if last or (train.image_every and done % train.image_every == 0):
            self._pictures(done)
        if saving:
            self._checkpoint(done)

    def _check_finite(self, step: int) -> None:
        """Raise on every rank when any rank met a loss that is not a finite number; before a checkpoint is written."""
        bad = torch.where(self.bad_step < 0, torch.full_like(self.bad_step, 2**62), self.bad_step)
        if self.world_size > 1:
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MIN)
        first = int(bad)
        if first <= step:
            raise NotFiniteError(
                f"the loss of step {first + 1} of {self.train.steps} is not a finite number (batch of "
                f"{self.train.batch_size}, rate {ds.learning_rate(self.train, first):.3g}, {self.train.precision}). "
                f"The newest checkpoint is from before it. Lower train.lr={self.train.lr:g}, lengthen "
                f"train.warmup={self.train.warmup:g}, set train.clip, or use train.precision=fp32."
            )

    def _log(self, done: int) -> None:
        metrics = self.meter.take(self.collectives)
        metrics["lr"] = ds.learning_rate(self.train, done - 1)
        self.history.append({"step": done, **{k: v for k, v in metrics.items() if math.isfinite(v)}})
        if self.rank == 0:
            began, since = self.clock
            rate = (done - since) * self.train.batch_size / max(time.monotonic() - began, 1e-9)
            self.clock = (time.monotonic(), done)
            self.job.board.metrics.remote(done, {**metrics, "samples_per_s": rate})

    def _pictures(self, done: int) -> None:
        """Show what the task draws. Rank 0 draws; under ZeRO-3, where no rank has whole weights, all draw the same."""
        together = any(engine.zero_optimization_stage() == 3 for engine in self.engines.values())
        if self.rank and not together:
            return
        state = torch.get_rng_state()
        for engine in self.engines.values():
            engine.eval()
        with torch.no_grad():
            pictures = self.task.pictures(self.engines)
        for name, picture in pictures.items() if self.rank == 0 else ():
            self.job.board.picture.remote(done, name, picture)
        torch.set_rng_state(state)

    # Checkpoints

    def _checkpoint(self, done: int) -> None:
        """Save everything that a resumed run needs; a barrier of all workers."""
        if self.rank == 0:
            self._write_history()
        if self.job.resumable:
            checkpoints.save(self.engines, self.task, {"step": done, "history": self.history}, self.collectives)

    def _resume(self) -> int:
        """Load the newest checkpoint, if any; returns the number of steps done."""
        state = checkpoints.load(self.engines, self.task, self.collectives) if self.job.resumable else None
        if state is None:
            return 0
        self.history = state["history"]
        return int(state["step"])

    def _write_history(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        storage.write_atomic(storage.join(self.job.path, HISTORY_FILE), lines.encode())

    # The end

    def _finish(self) -> dict[str, float]:
        """Gather whole weights; rank 0 writes the final model, the history, and the mark that all of it stands."""
        import ray

        for engine in self.engines.values():
            engine.eval()
        weights: dict[str, dict[str, Tensor]] = {}
        for name, engine in self.engines.items():
            whole = ds.full_weights(engine, on_this_rank=self.rank == 0)
            if whole is not None:
                weights[name] = whole
        numbers: Mapping[str, float] = {}
        if self.rank == 0:
            numbers = self.task.save(self.job.path, weights)
            self._write_history()
            final = {"steps": self.train.steps, "metrics": dict(numbers), "history": self.history[-1:]}
            storage.write_json(storage.join(self.job.path, DONE_FILE), final)
            ray.get(self.job.board.fatal.remote())  # calls arrive in order: after this one all that was told is there
        self.collectives.barrier()
        return dict(numbers)
