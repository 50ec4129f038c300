"""Entry point of the workers that Ray Train starts."""

from __future__ import annotations

from typing import TypedDict

from smalti.errors import SmaltiError
from smalti.workflows.train import engines, guards
from smalti.workflows.train.job import TrainingJob
from smalti.workflows.train.loop import Loop

TOGETHER = (guards.NotFiniteError, guards.DriftError)
"""Errors that all workers raise in the same step."""


class WorkerResult(TypedDict):
    """What `train_worker` returns: final numbers, and the error that only the user can fix."""

    metrics: dict[str, float]
    fatal: SmaltiError | None


def train_worker(job: TrainingJob) -> WorkerResult:
    """Entry point of a Ray Train worker.

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
        engines.prepare_process(job.gpus > 0, job.cpus)
        return {"metrics": Loop(job).run(), "fatal": None}
    except SmaltiError as error:
        if isinstance(error, TOGETHER) or ray.train.get_context().get_world_size() == 1:
            return {"metrics": {}, "fatal": error}
        ray.get(job.channel.fail.remote(error))
        raise
