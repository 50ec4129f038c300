"""Checkpoints of a training run, through Ray Train: engines' states, the task's, and where the loop was."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from smalti.errors import ConfigError, TrainingError
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.task import Task

STATE_FILE = "loop.json"
TASK_FILE = "task.pt"
TAG = "engine"


def save(engines: Mapping[str, Any], task: Task, state: dict[str, Any], collectives: Collectives) -> None:
    """Report a checkpoint of all that a resumed run needs; a barrier of all workers. `state["step"]`: steps done.

    The ranks' files merge into one folder; the loop's state comes with rank 0's.
    """
    import ray.train

    with tempfile.TemporaryDirectory(prefix="smalti-checkpoint-") as folder:
        for name, engine in engines.items():
            engine.save_checkpoint(os.path.join(folder, name), tag=TAG)
        if collectives.rank == 0:
            torch.save(task.state_dict(), os.path.join(folder, TASK_FILE))
            stages = {name: int(engine.zero_optimization_stage()) for name, engine in engines.items()}
            with open(os.path.join(folder, STATE_FILE), "w") as out:
                json.dump({**state, "world_size": collectives.world_size, "zero_stages": stages}, out)
        collectives.barrier()
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(
            {"step": state["step"]}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{state['step']:09d}"
        )


def load(engines: Mapping[str, Any], task: Task, collectives: Collectives) -> dict[str, Any] | None:
    """Take back the newest checkpoint; its state, or None when there is none.

    ConfigError: written with other ZeRO stages, or by another number of workers under ZeRO (whose optimizer states are
    cut by worker). TrainingError: it lacks an engine.
    """
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        with open(os.path.join(folder, STATE_FILE)) as file:
            state: dict[str, Any] = json.load(file)
        _check(state, engines, collectives, checkpoint.path)
        for name, engine in engines.items():
            found, _ = engine.load_checkpoint(os.path.join(folder, name), tag=TAG)
            if found is None:
                raise TrainingError(f"The checkpoint {checkpoint.path} holds no engine {name!r}; remove that folder.")
        device = next(iter(engines.values())).device
        task.load_state_dict(torch.load(os.path.join(folder, TASK_FILE), map_location=device, weights_only=True))
    return state


def _check(state: Mapping[str, Any], engines: Mapping[str, Any], collectives: Collectives, path: str) -> None:
    stages = {name: int(engine.zero_optimization_stage()) for name, engine in engines.items()}
    if state["zero_stages"] != stages:
        was = max(state["zero_stages"].values())
        raise ConfigError(
            f"The checkpoint {path} was written with train.zero_stage={was}, and now it is {max(stages.values())}. "
            f"Set it back to go on, or remove {os.path.dirname(path)} to begin again."
        )
    if any(stages.values()) and state["world_size"] != collectives.world_size:
        raise ConfigError(
            f"The checkpoint {path} was written by {state['world_size']} workers under ZeRO, whose optimizer states are "
            f"cut by worker, and resources.workers is {collectives.world_size}. Set resources.workers="
            f"{state['world_size']} to go on, or remove {os.path.dirname(path)} to begin again."
        )
