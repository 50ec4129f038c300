"""The one training loop, as each Ray Train worker runs it: DeepSpeed engines, checkpoints, metrics,
final weights.

Everything that a step depends on is a function of (seed, step) or lies in the checkpoint, so a
resumed run takes the same steps as an unbroken one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smalti import storage
from smalti.errors import SmaltiError
from smalti.workflows.pipeline.retry import retry_storage
from smalti.workflows.train import deepspeed_compat, guards
from smalti.workflows.train import engines as ds
from smalti.workflows.train.checkpoints import Checkpoints, check_best
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.data import BatchLoader, Joined, ShardRows
from smalti.workflows.train.metrics import MetricMeans
from smalti.workflows.train.periodic import Periodic
from smalti.workflows.train.scratch import sweep
from smalti.workflows.train.task import Batch, Context, Metrics, Task, seed_of
from smalti.workflows.train.throughput import Throughput

if TYPE_CHECKING:
    from smalti.schema import Train

HISTORY_FILE = "history.jsonl"
DONE_FILE = "trained.json"
CHECKPOINTS = "checkpoints"
NOTICE_S = 1.0
"""About how often the workers ask, together, whether a node is to be taken away; grace is half a
minute and more.
"""
TOGETHER = (guards.NotFiniteError, guards.DriftError)
"""Errors that all workers meet in the same step."""


@dataclass(frozen=True)
class Job:
    """What a worker needs for a training, as plain values that can be pickled.

    Attributes:
        task: made with `settings` in each worker.
        channel: handle of the DriverChannel actor.
        resumable: write checkpoints, and look for them at the start.
        preemptible: nodes may be taken away with notice.
        elastic: more workers may join during the run.
    """

    task: type[Task]
    settings: dict[str, Any]
    train: Train
    seed: int
    path: str
    cpus: int
    gpus: float
    channel: Any
    resumable: bool = True
    preemptible: bool = False
    elastic: bool = False

    def make_task(self) -> Task:
        """The task of this worker."""
        return self.task(**self.settings)


def train_worker(job: Job) -> dict[str, Any]:
    """Entry point of a Ray Train worker. Returns {"metrics", "fatal"}.

    A SmaltiError needs the user and is not retried. If every worker raises it at the same place, it
    is returned as `fatal`. Otherwise it is reported to the channel and raised, which ends the other
    workers; Ray then restarts the group, which returns it at once.
    """
    import ray
    import ray.train

    fatal = ray.get(job.channel.fatal.remote())
    if fatal is not None:
        return {"metrics": {}, "fatal": fatal}
    try:
        ds.prepare_process(job.gpus > 0, job.cpus)
        return {"metrics": Loop(job).run(), "fatal": None}
    except SmaltiError as error:
        if isinstance(error, TOGETHER) or ray.train.get_context().get_world_size() == 1:
            return {"metrics": {}, "fatal": error}
        ray.get(job.channel.fail.remote(error))
        raise


class Loop:
    """One training run on one worker. `run()` returns the final numbers on rank 0, {} elsewhere."""

    def __init__(self, job: Job) -> None:
        import ray.train.torch

        sweep()
        self.job, self.train = job, job.train
        self.collectives = Collectives()
        self.rank, self.world_size = self.collectives.rank, self.collectives.world_size
        self.device = ray.train.torch.get_device() if job.gpus > 0 else torch.device("cpu")
        self.micro, self.accumulation = ds.accumulation(self.train, self.world_size)
        self.means = MetricMeans(self.device)
        self.history: list[dict[str, float]] = []
        self.skips = guards.SkipCount(self.train.max_skipped)
        self.checkpoints = Checkpoints(
            storage.join(job.path, CHECKPOINTS),
            self.collectives,
            keep=job.train.keep,
            best=job.train.best,
            say=self._say,
        )
        self.best_checked = False
        self.saved = -1  # steps done at the last checkpoint
        self.notices: list[str] = []  # nodes that are about to be taken away
        self.notice_check = Periodic(NOTICE_S, self.collectives, self.device)

    def run(self) -> dict[str, float]:
        """Train from the newest checkpoint, or from nothing, to the last step; then write the final
        model.
        """
        torch.manual_seed(self.job.seed)
        self.task = self.job.make_task()
        self.task.setup(Context(self.device, self.collectives, self.job.seed, self.train))
        self.collectives.storage_barrier()  # weights were read
        self.engines = {
            name: self._engine(name, module) for name, module in self.task.modules().items()
        }
        source = self.task.source()
        if isinstance(source, ShardRows | Joined):
            source.choose_window(self.train, self._say)
        self.loader = BatchLoader(
            source,
            self.task.order(source),
            self.task.make_batch,
            batch_size=self.train.batch_size,
            micro=self.micro,
            rank=self.rank,
            world_size=self.world_size,
            threads=self.job.cpus,
        )
        start = self._resume()
        if self.rank == 0:
            self.job.channel.started.remote(start, self.world_size)
        self.throughput = Throughput(self.device, self.train.batch_size, self.task.flops_per_unit())
        ready = time.monotonic()
        for step, batches in self.loader.steps(start, self.train.steps):
            self.throughput.step(
                time.monotonic() - ready, [self.task.amount(batch) for batch in batches]
            )
            self._step(step, batches)
            self._after(step)
            ready = time.monotonic()
        self.checkpoints.wait()
        self.collectives.storage_barrier()
        return self._finish()

    def _say(self, line: str) -> None:
        if self.rank == 0:
            self.job.channel.say.remote(line)

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
        """All micro batches of a step, each engine in turn; then the engines move, all of them or
        none.
        """
        torch.manual_seed(seed_of(self.job.seed, 5, step, self.rank))
        self.task.begin_step(step, self.engines, self._read)
        for name, engine in self.engines.items():
            engine.train()
            ds.set_learning_rate(
                engine, ds.learning_rate(self.train, step, self.task.peak_lr(name))
            )
        moved = [self._to_device(batch) for batch in batches]
        share = self._share(moved)
        found: list[Metrics] = []
        acting: dict[str, Any] = {}
        for last, batch in zip([False] * (len(moved) - 1) + [True], moved, strict=True):
            for name, engine in self.engines.items():
                result = self.task.loss(name, self.engines, batch, step, share)
                if result is None:
                    continue
                loss, metrics = result
                engine.backward(guards.poisoned(loss))
                if not last:
                    engine.step()  # counts the micro batch
                acting[name] = engine
                found.append(metrics)
        self._move(step, acting, found)

    def _move(self, step: int, acting: dict[str, Any], found: list[Metrics]) -> None:
        """Step the engines that took part, unless a loss or gradient of any of them is no finite
        number.
        """
        norms = {name: deepspeed_compat.gradient_norm(engine) for name, engine in acting.items()}
        skipped = not all(math.isfinite(norm) for norm in norms.values())
        for name, engine in acting.items():
            deepspeed_compat.apply(engine, math.inf if skipped else norms[name])
        if self.skips.note(skipped):
            raise guards.not_finite(step, self.train, ds.learning_rate(self.train, step), found)
        if skipped:
            self.task.skipped(step)
            self._say(f"step {step + 1:,} passed over: its loss or gradient is no finite number")
            return
        for metrics in found:
            self.means.add(metrics, self.world_size * self.accumulation)
        first = next(iter(self.engines))
        named = {
            "grad_norm" if name == first else f"grad_norm_{name}": norm
            for name, norm in norms.items()
        }
        self.means.add({**named, **self.task.after_step(step, self.engines)}, self.world_size)

    def _share(self, batches: list[Batch]) -> Tensor | None:
        """Counts of the whole step, over micro batches and workers, divided by the number of micro
        batches.
        """
        counts = [self.task.totals(batch) for batch in batches]
        present = [count for count in counts if count is not None]
        if not present:
            return None
        total = self.collectives.all_reduce(torch.stack(present).sum(0).to(self.device))
        return total / (len(batches) * self.world_size)

    def _read(self, step: int) -> list[Batch]:
        return [self._to_device(batch) for batch in self.loader.at(step)]

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        return {
            k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in pinned.items()
        }

    # After a step: log, pictures, checkpoint

    def _after(self, step: int) -> None:
        done, train = step + 1, self.train
        last = done == train.steps
        if last or (train.check_every and done % train.check_every == 0):
            guards.check_same(guards.held_whole(self.engines), self.collectives, done)
        if done % train.log_every == 0 or last:
            self._log(done)
            if self.job.elastic and not last:
                self._save_if_requested(done)
        if last or (train.image_every and done % train.image_every == 0):
            self._pictures(done)
        if done % train.checkpoint_every == 0 or last:
            self._checkpoint(done)
        if self.job.preemptible and self.job.resumable and self.notice_check.due(done):
            self._save_before_preemption(done)

    def _save_before_preemption(self, done: int) -> None:
        """Save at once when a node is about to be taken away; Ray starts the workers again without
        it.
        """
        import ray.train

        notice = ray.train.get_preemption_info()  # the same on every worker
        if notice is None or notice.preempted_node_ids == self.notices:
            return
        self.notices = notice.preempted_node_ids
        self._save_now(done)
        ranks = ", ".join(map(str, notice.preempted_ranks))
        self._say(
            f"the machine of worker(s) {ranks} is about to be taken away: saved at step {done:,}"
        )

    def _save_if_requested(self, done: int) -> None:
        """Save when there is room for more workers, which then start from here."""
        import ray

        wished = self.rank == 0 and ray.get(self.job.channel.checkpoint_requested.remote())
        if self.collectives.broadcast_object(wished, self.device):
            self._save_now(done)
            if self.rank == 0:
                self.job.channel.saved.remote()
            self._say(f"there is room for more workers: saved at step {done:,}")

    def _save_now(self, done: int) -> None:
        """A checkpoint that stands, of all workers, when this returns."""
        self._checkpoint(done)
        self.checkpoints.wait()
        self.collectives.storage_barrier()

    def _log(self, done: int) -> None:
        added = set(self.means.sums)
        metrics = self.means.take(self.collectives)
        metrics |= {
            "lr": ds.learning_rate(self.train, done - 1),
            "skipped_steps": float(self.skips.total),
        }
        if added and not self.best_checked:  # nothing is added while steps are passed over
            check_best(self.train.best, added | metrics.keys())
            self.best_checked = True
        self.history.append(
            {"step": done, **{k: v for k, v in metrics.items() if math.isfinite(v)}}
        )
        rates = self.throughput.take(self.collectives)
        if self.rank == 0:
            self.job.channel.metrics.remote(done, metrics | rates)

    def _pictures(self, done: int) -> None:
        """Show what the task draws.

        Rank 0 draws; under ZeRO-3, where no rank has whole weights, all draw the same.
        """
        together = any(engine.zero_optimization_stage() == 3 for engine in self.engines.values())
        if self.rank and not together:
            return
        state = torch.get_rng_state()
        for engine in self.engines.values():
            engine.eval()
        with torch.no_grad():
            pictures = self.task.pictures(self.engines)
        for name, picture in pictures.items() if self.rank == 0 else ():
            self.job.channel.picture.remote(done, name, picture)
        torch.set_rng_state(state)

    # Checkpoints

    def _checkpoint(self, done: int) -> None:
        """Save everything that a resumed run needs; a barrier of all workers."""
        if self.rank == 0:
            self._write_history()
        if self.job.resumable and done != self.saved:
            self.saved = done
            state: dict[str, Any] = {
                "step": done,
                "history": self.history,
                "skips": self.skips.state_dict(),
            }
            state["meter"] = self.means.totals(self.collectives)
            state["at_once"] = self.train.batch_size // self.accumulation
            self.checkpoints.save(self.engines, self.task, state)

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if any; returns the number of steps done."""
        state = self.checkpoints.load(self.engines, self.task) if self.job.resumable else None
        if state is None:
            return 0
        self.history = state["history"]
        self.skips.load_state_dict(state["skips"])
        self.means.restore(state["meter"], self.rank)
        self.saved = int(state["step"])
        before, now = state.get("at_once"), self.train.batch_size // self.accumulation
        if self.task.together and before not in (None, now):
            self._say(
                f"{self.task.together} saw {before} samples at once before and sees {now} from here on (train.batch_size / "
                "accumulation steps): the curve may jump. The same number of workers as before would keep it."
            )
        return self.saved

    def _write_history(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        path = storage.join(self.job.path, HISTORY_FILE)
        retry_storage(storage.write_atomic, path, lines.encode(), say=self._say)

    # The end

    def _finish(self) -> dict[str, float]:
        """Gather whole weights; rank 0 writes the final model, the history, and the mark that all
        of it stands.
        """
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
            final = {
                "steps": self.train.steps,
                "metrics": dict(numbers),
                "history": self.history[-1:],
            }
            storage.write_json(storage.join(self.job.path, DONE_FILE), final)
            ray.get(
                self.job.channel.fatal.remote()
            )  # calls arrive in order: after this one all that was told is there
        self.collectives.storage_barrier()
        return dict(numbers)
