"""What each worker of a training is started with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smalti.workflows.train.checkpoint_policy import CheckpointPolicy

if TYPE_CHECKING:
    from smalti.schema import Train
    from smalti.workflows.train.driver_channel import ChannelHandle
    from smalti.workflows.train.task import Task


@dataclass(frozen=True)
class TrainingJob:
    """What a worker needs for a training, as plain values that can be pickled.

    Attributes:
        task: created with `settings` in each worker.
        settings: keyword arguments of the task.
        train: the recipe's `train` section.
        seed: the recipe's seed.
        path: folder of the stage, which gets the final model.
        cpus: CPUs per worker.
        gpus: GPUs per worker; 0 trains on CPUs.
        channel: handle of the DriverChannel actor.
        resumable: write checkpoints, and resume from one at the start.
        preemptible: nodes may be taken away with notice.
        elastic: more workers may join during the run.
    """

    task: type[Task]
    settings: dict[str, object]
    train: Train
    seed: int
    path: str
    cpus: int
    gpus: float
    channel: ChannelHandle
    resumable: bool = True
    preemptible: bool = False
    elastic: bool = False

    def make_task(self) -> Task:
        """The task of this worker."""
        return self.task(**self.settings)

    def checkpoint_policy(self) -> CheckpointPolicy:
        """When this training writes checkpoints, and which are kept."""
        return CheckpointPolicy(
            steps=self.train.steps,
            every=self.train.checkpoint_every,
            keep=self.train.keep,
            best=self.train.best,
            resumable=self.resumable,
            preemptible=self.preemptible,
            elastic=self.elastic,
        )
