"""What the driver tells while a training runs: progress, metrics, pictures, workers that failed,
machines that went.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from smalti.progress import Progress, format_count

if TYPE_CHECKING:
    from smalti.schema import Train
    from smalti.workflows.pipeline.stage import StageRun

POLL_S, LOOK_S = 0.5, 5.0
LONG_S = 120.0  # a start takes a minute at worst where imports come from a slow disk


class ProgressMonitor:
    """Reads the channel in a thread while the trainer runs: terminal progress, tracker metrics and
    pictures.
    """

    def __init__(self, channel: Any, train: Train, run: StageRun) -> None:
        self.channel, self.train, self.run = channel, train, run
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.progress: Progress | None = None
        self.began = time.monotonic()
        self.waiting_since: float | None = self.began
        self.nodes = alive_nodes()
        self.looked = self.began
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> ProgressMonitor:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.error is not None and exc[0] is None:
            raise self.error

    def _watch(self) -> None:
        try:
            with ExitStack() as stack:
                while True:
                    ending = self.stop.is_set()
                    self._show(stack)
                    self._look_at_nodes()
                    if ending:
                        return
                    self.stop.wait(POLL_S)
        except BaseException as error:  # raised in the driver's thread when the trainer is done
            self.run.log(f"progress and metrics stop here: {error}")
            self.error = error

    def _show(self, stack: ExitStack) -> None:
        """Pass on what the channel holds; the bar opens when the workers are ready, so that its
        rate is theirs.
        """
        import ray

        for line in ray.get(self.channel.take_failures.remote()):
            self.run.log(f"{line}; the workers start again")
            self.waiting_since = time.monotonic()
        metrics, pictures, started, lines = ray.get(self.channel.take.remote())
        for line in lines:
            self.run.log(line)
        for step, workers in started:
            self.waiting_since = None
            ready_s = time.monotonic() - self.began
            where = f", going on after step {step:,}" if step else ""
            self.run.log(f"{workers} worker(s) ready after {ready_s:.0f} s{where}")
            if self.progress is None:
                self.progress = stack.enter_context(
                    Progress(self.train.steps, "steps", self.run.name, done=step)
                )
        for step, numbers in metrics:
            self.run.tracker.metrics(numbers, step=step)
            told = {"loss": f"{numbers['loss']:.4g}"} if "loss" in numbers else {}
            if (
                self.progress is not None
            ):  # a restarted group repeats steps; the bar never runs backwards
                self.progress.update(max(0, step - self.progress.count), **told, **rates(numbers))
        for step, name, picture in pictures:
            self.run.tracker.image(name, picture, step=step)

    def _look_at_nodes(self) -> None:
        """Say which machines came and went, and what workers that do not start wait for."""
        import ray

        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        before, self.nodes = self.nodes, alive_nodes()
        for node in before.keys() - self.nodes.keys():
            self.run.log(f"machine {before[node]} is gone: {len(self.nodes)} in the cluster")
        for node in self.nodes.keys() - before.keys():
            self.run.log(f"machine {self.nodes[node]} came: {len(self.nodes)} in the cluster")
        if self.waiting_since is not None and now - self.waiting_since > LONG_S:
            resources, free = self.run.recipe.resources, ray.available_resources()
            self.run.log(
                f"no workers have started in {now - self.waiting_since:.0f} s: {resources.min_workers} or more with "
                f"{resources.cpus_per_worker} CPUs and {resources.gpus_per_worker:g} GPUs each are needed, and "
                f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free"
            )
            self.waiting_since = now


def alive_nodes() -> dict[str, str]:
    """Address by id of the machines of the cluster."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def rates(numbers: Mapping[str, float]) -> dict[str, str]:
    """The throughput of a logged step, as the progress line shows it."""
    told = {"samples/s": f"{numbers['samples_per_s']:.0f}"}
    told |= {
        name.replace("_per_s", "/s"): format_count(value)
        for name, value in numbers.items()
        if name.endswith("_per_s") and name != "samples_per_s"
    }
    if "mfu" in numbers:
        told["MFU"] = f"{numbers['mfu']:.1%}"
    return told | {
        "waiting": f"{numbers['data_wait']:.0%}",
        "memory": f"{numbers['memory_gb']:.1f} GB",
    }
