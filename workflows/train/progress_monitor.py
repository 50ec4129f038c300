"""What the driver logs while a training runs.

Progress, metrics, pictures, workers that failed, nodes that joined or left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from smalti.progress import Progress, format_count

if TYPE_CHECKING:
    from smalti.schema import Train
    from smalti.workflows.pipeline.stage import StageRun
    from smalti.workflows.train.driver_channel import ChannelHandle

POLL_S = 0.5
NODES_S = 5.0
"""Seconds between two checks of the cluster's nodes."""
LONG_S = 120.0
"""When to report that no workers have started: imports from a slow disk take up to a minute."""


class ProgressMonitor:
    """Reads the channel in a thread while the trainer runs.

    It shows progress on the terminal, and passes metrics and pictures to the tracker.
    """

    def __init__(self, channel: ChannelHandle, train: Train, run: StageRun) -> None:
        self.channel = channel
        self.train = train
        self.run = run
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.progress: Progress | None = None
        self.began = time.monotonic()
        self.waiting_since: float | None = self.began
        self.nodes = alive_nodes()
        self.nodes_checked = self.began
        self.thread = threading.Thread(target=self._poll, name="progress", daemon=True)

    def __enter__(self) -> ProgressMonitor:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.error is not None and exc[0] is None:
            raise self.error

    def _poll(self) -> None:
        try:
            with ExitStack() as stack:
                while True:
                    ending = self.stop.is_set()
                    self._show(stack)
                    self._report_nodes()
                    if ending:
                        return
                    self.stop.wait(POLL_S)
        except BaseException as error:  # raised in the driver's thread when the trainer is done
            self.run.log(f"progress and metrics stop here: {error}")
            self.error = error

    def _show(self, stack: ExitStack) -> None:
        """Show and log what the channel has received.

        The progress bar starts when the workers are ready, so that its rate is theirs.
        """
        import ray

        for line in ray.get(self.channel.take_failures.remote()):
            self.run.log(f"{line}; restarting the workers")
            self.waiting_since = time.monotonic()
        reports = ray.get(self.channel.take.remote())
        for line in reports.lines:
            self.run.log(line)
        for step, workers in reports.started:
            self._show_start(step, workers, stack)
        for step, numbers in reports.metrics:
            self._show_metrics(step, numbers)
        for step, name, picture in reports.pictures:
            self.run.tracker.image(name, picture, step=step)

    def _show_start(self, step: int, workers: int, stack: ExitStack) -> None:
        self.waiting_since = None
        ready_s = time.monotonic() - self.began
        where = f", resuming after step {step:,}" if step else ""
        self.run.log(f"{workers} worker(s) ready after {ready_s:.0f} s{where}")
        if self.progress is None:
            bar = Progress(self.train.steps, "steps", self.run.name, done=step)
            self.progress = stack.enter_context(bar)

    def _show_metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.tracker.metrics(numbers, step=step)
        if self.progress is None:
            return
        shown = {"loss": f"{numbers['loss']:.4g}"} if "loss" in numbers else {}
        # Restarted workers repeat steps; the bar never runs backwards.
        self.progress.update(max(0, step - self.progress.count), **shown, **rates(numbers))

    def _report_nodes(self) -> None:
        """Log nodes that joined or left, and what waiting workers need."""
        import ray

        now = time.monotonic()
        if now - self.nodes_checked < NODES_S:
            return
        self.nodes_checked = now
        before = self.nodes
        self.nodes = alive_nodes()
        for node in before.keys() - self.nodes.keys():
            self.run.log(f"node {before[node]} left: {len(self.nodes)} in the cluster")
        for node in self.nodes.keys() - before.keys():
            self.run.log(f"node {self.nodes[node]} joined: {len(self.nodes)} in the cluster")
        if self.waiting_since is not None and now - self.waiting_since > LONG_S:
            resources = self.run.recipe.resources
            free = ray.available_resources()
            self.run.log(
                f"no workers have started in {now - self.waiting_since:.0f} s: "
                f"{resources.min_workers} or more with {resources.cpus_per_worker} CPUs and "
                f"{resources.gpus_per_worker:g} GPUs each are needed, and {free.get('CPU', 0):g} "
                f"CPUs and {free.get('GPU', 0):g} GPUs are free"
            )
            self.waiting_since = now


def alive_nodes() -> dict[str, str]:
    """Address by id of the cluster's nodes that are alive."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def rates(numbers: Mapping[str, float]) -> dict[str, str]:
    """The throughput of a logged step, as the progress line shows it."""
    shown = {"samples/s": f"{numbers['samples_per_s']:.0f}"}
    shown |= {
        name.replace("_per_s", "/s"): format_count(value)
        for name, value in numbers.items()
        if name.endswith("_per_s") and name != "samples_per_s"
    }
    if "mfu" in numbers:
        shown["MFU"] = f"{numbers['mfu']:.1%}"
    return shown | {
        "waiting": f"{numbers['data_wait']:.0%}",
        "memory": f"{numbers['memory_gb']:.1f} GB",
    }
