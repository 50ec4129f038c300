"""The one training loop, as each Ray Train worker runs it.

Everything that a step depends on is a function of (seed, step) or is in the checkpoint, so a
resumed run takes the same steps as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smalti import storage
from smalti.workflows.pipeline.retry import retry_storage
from smalti.workflows.train import deepspeed_compat, guards
from smalti.workflows.train import engines as ds
from smalti.workflows.train.batch_loader import BatchLoader
from smalti.workflows.train.checkpoints import Checkpoints, LoopState
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.data import Joined, ShardRows
from smalti.workflows.train.deepspeed_compat import Engine
from smalti.workflows.train.job import TrainingJob
from smalti.workflows.train.metrics import MetricMeans
from smalti.workflows.train.periodic import Periodic
from smalti.workflows.train.scratch import sweep
from smalti.workflows.train.task import Batch, Context, Metrics, seed_of
from smalti.workflows.train.throughput import Throughput

HISTORY_FILE = "history.jsonl"
DONE_FILE = "trained.json"
CHECKPOINTS = "checkpoints"
NOTICE_S = 1.0
"""About how often the workers ask, together, for notices: clouds give them 30 s ahead or more."""


class Loop:
    """One training run on one worker. `run()` returns the final numbers on rank 0, {} elsewhere."""

    def __init__(self, job: TrainingJob) -> None:
        import ray.train.torch

        sweep()
        self.job = job
        self.train = job.train
        self.collectives = Collectives()
        self.rank = self.collectives.rank
        self.world_size = self.collectives.world_size
        self.device = ray.train.torch.get_device() if job.gpus > 0 else torch.device("cpu")
        self.micro, self.accumulation = ds.accumulation(self.train, self.world_size)
        self.means = MetricMeans(self.device)
        self.history: list[dict[str, float]] = []
        self.skips = guards.SkipCount(self.train.max_skipped)
        self.policy = job.checkpoint_policy()
        self.checkpoints = Checkpoints(
            storage.join(job.path, CHECKPOINTS),
            self.collectives,
            self.policy,
            say=self._say,
            say_own=self._say_own,
        )
        self.notice_check = Periodic(NOTICE_S, self.collectives, self.device)

    def run(self) -> dict[str, float]:
        """Train to the last step, then write the final model.

        Starts from the newest checkpoint, if there is one.
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
            source.configure(self.train, self._say, self._say_own)
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
        self._train()
        self.checkpoints.wait()
        self.collectives.storage_barrier()
        return self._finish()

    def _train(self) -> None:
        """The steps, from the checkpoint's on."""
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

    def _say(self, line: str) -> None:
        """Log a line that is the same on every worker."""
        if self.rank == 0:
            self.job.channel.say.remote(line)

    def _say_own(self, line: str) -> None:
        """Log a line about this worker alone."""
        self.job.channel.say.remote(f"worker {self.rank}: {line}")

    def _engine(self, name: str, module: nn.Module) -> Engine:
        return ds.build_engine(
            module,
            self.train,
            lr=self.task.peak_lr(name),
            zero_stage=self.task.zero_stage(name),
            world_size=self.world_size,
            device=self.device,
        )

    def _step(self, step: int, batches: list[Batch]) -> None:
        """Forward and backward of all micro batches, each engine in turn; then the optimizers."""
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
        acting: dict[str, Engine] = {}
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
        self._update(step, acting, found)

    def _update(self, step: int, acting: dict[str, Engine], found: list[Metrics]) -> None:
        """Step the optimizers of the engines that had a loss.

        None is stepped if a loss or gradient of any of them is NaN or Inf.
        """
        norms = {name: deepspeed_compat.gradient_norm(engine) for name, engine in acting.items()}
        skipped = not all(math.isfinite(norm) for norm in norms.values())
        for name, engine in acting.items():
            deepspeed_compat.apply(engine, math.inf if skipped else norms[name])
        if self.skips.note(skipped):
            raise guards.not_finite(step, self.train, ds.learning_rate(self.train, step), found)
        if skipped:
            self.task.skipped(step)
            self._say(f"step {step + 1:,} is skipped: its loss or gradient is not finite")
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
        """The step's counts over all workers, divided by its number of micro batches.

        None where the task's losses are means over samples.
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

    def _after(self, step: int) -> None:
        done = step + 1
        last = done == self.train.steps
        if last or (self.train.check_every and done % self.train.check_every == 0):
            guards.check_same(guards.replicated(self.engines), self.collectives, done)
        if last or done % self.train.log_every == 0:
            self._log(done)
            if self.policy.asks_for_growth(done):
                self._save_if_requested(done)
        if last or (self.train.image_every and done % self.train.image_every == 0):
            self._pictures(done)
        if self.policy.due(done):
            self._checkpoint(done)
        if self.policy.asks_for_notices() and self.notice_check.due(done):
            self._save_before_preemption(done)

    def _save_before_preemption(self, done: int) -> None:
        """Save when a node will be taken away; Ray then restarts without it."""
        import ray.train

        notice = ray.train.get_preemption_info()  # the same on every worker
        if notice is None or not self.policy.is_new_notice(notice.preempted_node_ids):
            return
        self._save_now(done)
        ranks = ", ".join(map(str, notice.preempted_ranks))
        self._say(f"the node of worker(s) {ranks} will be taken away: saved at step {done:,}")

    def _save_if_requested(self, done: int) -> None:
        """Save when more workers are waiting for a checkpoint to start from."""
        import ray

        channel = self.job.channel
        requested = self.rank == 0 and ray.get(channel.checkpoint_requested.remote())
        if self.collectives.broadcast_object(requested, self.device):
            self._save_now(done)
            if self.rank == 0:
                channel.saved.remote()
            self._say(f"there is room for more workers: saved at step {done:,}")

    def _save_now(self, done: int) -> None:
        """Save; on return the checkpoint of all workers is complete in storage."""
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
        if added:  # nothing is added by steps that are skipped
            self.policy.check_metric(added | metrics.keys())
        self.history.append(
            {"step": done, **{k: v for k, v in metrics.items() if math.isfinite(v)}}
        )
        rates = self.throughput.take(self.collectives)
        if self.rank == 0:
            self.job.channel.metrics.remote(done, metrics | rates)

    def _pictures(self, done: int) -> None:
        """Log the task's pictures.

        Rank 0 makes them; under ZeRO-3, where no rank has whole weights, all make the same ones.
        """
        together = any(engine.zero_optimization_stage() == 3 for engine in self.engines.values())
        if self.rank and not together:
            return
        state = torch.get_rng_state()
        for engine in self.engines.values():
            engine.eval()
        with torch.no_grad():
            pictures = self.task.pictures(self.engines)
        if self.rank == 0:
            for name, picture in pictures.items():
                self.job.channel.picture.remote(done, name, picture)
        torch.set_rng_state(state)

    def _checkpoint(self, done: int) -> None:
        """Save everything that a resumed run needs; all workers call it."""
        if self.rank == 0:
            self._write_history()
        if not self.policy.start(done):
            return
        state: LoopState = {
            "step": done,
            "history": self.history,
            "skips": self.skips.state_dict(),
            "meter": self.means.totals(self.collectives),
            "at_once": self.train.batch_size // self.accumulation,
        }
        self.checkpoints.save(self.engines, self.task, state)

    def _resume(self) -> int:
        """Load the newest complete checkpoint, if any; returns the number of steps done."""
        state = self.checkpoints.load(self.engines, self.task) if self.job.resumable else None
        if state is None:
            return 0
        self.history = state["history"]
        self.skips.load_state_dict(state["skips"])
        self.means.restore(state["meter"], self.rank)
        self.policy.resumed(state["step"])
        before = state.get("at_once")
        now = self.train.batch_size // self.accumulation
        if self.task.together and before not in (None, now):
            self._say(
                f"{self.task.together} saw {before} samples at once before and sees {now} from "
                "here on (train.batch_size / accumulation steps): the curve may jump. Train with "
                "the same number of workers as before to avoid it."
            )
        return state["step"]

    def _write_history(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        path = storage.join(self.job.path, HISTORY_FILE)
        retry_storage(storage.write_atomic, path, lines.encode(), say=self._say_own)

    def _finish(self) -> dict[str, float]:
        """Gather whole weights; rank 0 writes the final model, and `DONE_FILE` last of all."""
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
            last = self.history[-1:]
            final = {"steps": self.train.steps, "metrics": dict(numbers), "history": last}
            storage.write_json(storage.join(self.job.path, DONE_FILE), final)
            # Calls arrive in order: after this one the channel has everything that was sent.
            ray.get(self.job.channel.fatal.remote())
        self.collectives.storage_barrier()
        return dict(numbers)
