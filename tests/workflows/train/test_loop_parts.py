"""Logging and resuming of the loop, without Ray.

Covers: workflows/train/loop.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from smalti.errors import ConfigError
from smalti.schema import (
    Train,
)
from smalti.workflows.train.checkpoint_policy import CheckpointPolicy
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.guards import SkipCount
from smalti.workflows.train.loop import Loop
from smalti.workflows.train.metrics import MetricMeans
from smalti.workflows.train.task import Task
from smalti.workflows.train.tasks.encoder import EncoderTask
from smalti.workflows.train.throughput import Throughput


def test_a_metric_that_is_not_logged_ends_the_run_at_the_first_log() -> None:
    """One that is NaN, or has counted nothing yet, is logged all the same.

    Where every step was skipped, nothing is known of the metrics yet.
    """
    loop = Loop.__new__(Loop)  # only what a log needs
    loop.collectives = Collectives()
    loop.job = SimpleNamespace(elastic=False)
    loop.means = MetricMeans(torch.device("cpu"))
    loop.skips = SkipCount(1)
    loop.rank = 1
    loop.throughput = Throughput(torch.device("cpu"), 1, None)
    for best in ("loss", "max:psnr", "max:accuracy"):
        loop.train, loop.history, loop.policy = Train(best=best), [], CheckpointPolicy(best=best)
        loop.means.add(
            {"loss": 2.0, "psnr": float("nan"), "accuracy": (torch.tensor(0.0), torch.tensor(0.0))}
        )
        loop._log(4)
        assert loop.history[0]["loss"] == 2.0
    loop.train, loop.history, loop.policy = Train(best="los"), [], CheckpointPolicy(best="los")
    loop._log(4)
    loop.means.add({"loss": 2.0})
    with pytest.raises(
        ConfigError, match=r"train.best=los names no metric .* it logs loss, lr, skipped_steps"
    ):
        loop._log(4)


def test_another_number_of_samples_at_once_is_reported_when_the_run_resumes() -> None:
    state = {
        "history": [],
        "skips": SkipCount(1).state_dict(),
        "meter": {},
        "step": 4,
        "at_once": 4,
    }
    lines: list[str] = []
    loop = Loop.__new__(Loop)  # only what resuming needs
    loop.job, loop.engines, loop.rank = SimpleNamespace(resumable=True), {}, 0
    loop.policy = CheckpointPolicy()
    loop.checkpoints = SimpleNamespace(load=lambda engines, task: state)
    loop.means, loop.skips, loop.train, loop._say = (
        MetricMeans(torch.device("cpu")),
        SkipCount(1),
        Train(),
        lines.append,
    )
    for task, loop.accumulation in ((Task(), 1), (EncoderTask, 8), (EncoderTask, 4)):
        loop.task, loop.train = task, Train(batch_size=32)
        assert loop._resume() == 4
    assert [line.split(" (")[0] for line in lines] == [
        "the contrastive loss saw 4 samples at once before and sees 8 from here on"
    ]


def test_a_line_for_all_is_logged_once_and_a_workers_own_names_its_rank() -> None:
    lines: list[str] = []
    say = SimpleNamespace(remote=lines.append)
    for rank in range(2):
        loop = Loop.__new__(Loop)  # only what logging needs
        loop.job = SimpleNamespace(channel=SimpleNamespace(say=say))
        loop.rank = rank
        loop._say("for all")
        loop._say_own("put_file failed")
    assert lines == ["for all", "worker 0: put_file failed", "worker 1: put_file failed"]
