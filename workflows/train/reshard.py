"""Engine states written by another number of workers, by DeepSpeed's universal checkpoint.

A universal checkpoint has each parameter whole. The first worker of each node converts the
checkpoint once; then each worker loads its part.
"""

from __future__ import annotations

import glob
import os
import pickle
import tempfile

import torch

from smalti.errors import TrainingError
from smalti.workflows.train import deepspeed_compat
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.deepspeed_compat import Engine
from smalti.workflows.train.scratch import disk_is_full, shared_folder

CONVERTED = "universal"
NO_FIT = (
    AssertionError,
    LookupError,
    ValueError,
    FileNotFoundError,
    EOFError,
    pickle.UnpicklingError,
)
"""What DeepSpeed raises for files that are not what it expects."""


def load(engine: Engine, folder: str, tag: str, collectives: Collectives, *, shown: str) -> None:
    """Load a checkpoint that another number of workers wrote; every worker calls it.

    Args:
        engine: a ZeRO engine.
        folder: local folder of the engine's states.
        tag: name of the checkpoint in `folder`.
        collectives: of the workers.
        shown: name of the checkpoint in errors.
    """

    def convert(shared: str) -> None:
        _convert(os.path.join(folder, tag), os.path.join(shared, CONVERTED), shown)

    with shared_folder("universal", convert, collectives) as converted:
        _load_universal(engine, converted, shown)
        _load_rest(engine, os.path.join(folder, tag))


def _load_universal(engine: Engine, converted: str, shown: str) -> None:
    """Load a universal checkpoint; settings of groups and step counts stay apart."""
    optimizer = deepspeed_compat.torch_optimizer(engine)
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    with deepspeed_compat.universal_checkpoint(engine):
        load_engine(engine, converted, CONVERTED, shown=shown)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)  # DeepSpeed gives all groups the weight decay of the first
    for state in optimizer.state.values():
        # One tensor for all of them would count several times per step.
        state["step"] = state["step"].clone()


def load_engine(engine: Engine, folder: str, tag: str, *, shown: str) -> None:
    """Load the checkpoint `tag` in `folder` into an engine; errors name it `shown`.

    Raises:
        TrainingError: it does not fit, or does not exist.
        Exception: what a collective raises when another worker has died.
    """
    try:
        loaded, _ = engine.load_checkpoint(folder, tag=tag)
        found = "" if loaded is not None else "it does not exist"
    except NO_FIT as error:
        found = f"{type(error).__name__}: {error}"
    if found:
        raise TrainingError(
            f"DeepSpeed could not load the checkpoint {shown} ({found}). Remove its step's folder "
            "to resume from the one before."
        )


def _convert(source: str, target: str, shown: str) -> None:
    """Convert a checkpoint to a universal one.

    Raises:
        TrainingError: the disk is full, or DeepSpeed could not convert it.
    """
    try:
        deepspeed_compat.convert_to_universal(source, target)
    except Exception as error:  # whatever its many steps raise
        if disk_is_full(error):
            raise TrainingError(
                f"no room in {tempfile.gettempdir()} for a universal checkpoint "
                f"({str(error).splitlines()[0]}): with another number of workers than the one that "
                "wrote the checkpoint, each node needs room there for all weights and optimizer "
                "states in float32, twice (its first worker converts them), and for the checkpoint "
                "itself when it comes from an object store. Free some space, set TMPDIR to a "
                "larger disk, or start with the number of workers that wrote it."
            ) from error
        raise TrainingError(
            f"DeepSpeed could not make a universal checkpoint of {shown} for another number of "
            f"workers: {type(error).__name__}: {error}. Start with the number of workers that "
            "wrote it."
        ) from error


@torch.no_grad()
def _load_rest(engine: Engine, folder: str) -> None:
    """Load what a universal checkpoint leaves out: buffers, and below ZeRO-3 frozen parameters.

    They are the same on every worker that wrote the checkpoint, so the first file has them all.
    """
    first = sorted(glob.glob(os.path.join(folder, "*model_states.pt")))[0]
    # Our own file; it holds objects of DeepSpeed.
    saved = torch.load(first, map_location="cpu", weights_only=False, mmap=True)["module"]
    module = engine.module
    rest: dict[str, torch.Tensor] = dict(module.named_buffers())
    if engine.zero_optimization_stage() < 3:
        rest |= {name: p for name, p in module.named_parameters() if not p.requires_grad}
    for name, tensor in rest.items():
        if name in saved:
            tensor.copy_(saved[name])
