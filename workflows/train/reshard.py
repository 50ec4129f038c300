"""ZeRO states of another number of workers: DeepSpeed's universal checkpoint, which holds each
parameter whole.

Made once a machine, by the first of its workers; then each worker takes its part.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import os
import pickle
import tempfile
from typing import Any

import torch

from smalti.errors import TrainingError
from smalti.workflows.train.collectives import Collectives
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


def load(engine: Any, folder: str, tag: str, collectives: Collectives, *, shown: str) -> None:
    """Load `folder`/`tag`, a checkpoint of a ZeRO engine by another number of workers, which errors
    name as `shown`; every worker calls it.
    """
    convert = lambda made: _convert(os.path.join(folder, tag), os.path.join(made, CONVERTED), shown)  # noqa: E731
    with shared_folder("universal", convert, collectives) as made:
        optimizer = engine.optimizer.optimizer
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        engine._config.load_universal_checkpoint = True
        try:
            load_engine(engine, made, CONVERTED, shown=shown)
        finally:
            engine._config.load_universal_checkpoint = False
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)  # DeepSpeed gives all groups the decay of the first
        for state in optimizer.state.values():
            state["step"] = state[
                "step"
            ].clone()  # one tensor for all of them would count several times a step
        _load_rest(engine, os.path.join(folder, tag))


def load_engine(engine: Any, folder: str, tag: str, *, shown: str) -> None:
    """Load `folder`/`tag` into an engine.

    TrainingError, which names the checkpoint `shown`, when it does not fit or is not there; what a
    collective raises, when another worker has died, stays what it is.
    """
    try:
        loaded, _ = engine.load_checkpoint(folder, tag=tag)
        found = "" if loaded is not None else "it does not exist"
    except NO_FIT as error:
        found = f"{type(error).__name__}: {error}"
    if found:
        raise TrainingError(
            f"DeepSpeed could not load the checkpoint {shown} ({found}). Remove its step's folder to go on from the one before."
        )


def _convert(source: str, target: str, shown: str) -> None:
    """DeepSpeed's own conversion, in this process: it is bound by reading and writing, and prints a
    line a file.
    """
    from deepspeed.checkpoint import ds_to_universal

    asked = argparse.Namespace(
        input_folder=source,
        output_folder=target,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            ds_to_universal.main(asked)
    except Exception as error:  # whatever its many steps raise
        if disk_is_full(error):
            raise TrainingError(
                f"no room in {tempfile.gettempdir()} for a universal checkpoint ({str(error).splitlines()[0]}): at another number of "
                "workers each machine needs room there for all weights and optimizer states in float32, twice (the first of "
                "its workers converts them), and for the checkpoint itself when it comes from an object store. Free some "
                "space, set TMPDIR to a larger disk, or start with the number of workers that wrote it."
            ) from error
        raise TrainingError(
            f"DeepSpeed could not make a universal checkpoint of {shown} for another number of workers: "
            f"{type(error).__name__}: {error}. Start with the number of workers that wrote it."
        ) from error


@torch.no_grad()
def _load_rest(engine: Any, folder: str) -> None:
    """Buffers, which a universal checkpoint leaves out, and below ZeRO-3 the frozen parameters; the
    same on every worker that wrote it, so the first file has them all.
    """
    first = sorted(glob.glob(os.path.join(folder, "*model_states.pt")))[0]
    saved = torch.load(first, map_location="cpu", weights_only=False, mmap=True)[
        "module"
    ]  # our own, DeepSpeed's objects
    module = engine.module
    rest: dict[str, torch.Tensor] = dict(module.named_buffers())
    if engine.zero_optimization_stage() < 3:
        rest |= {name: p for name, p in module.named_parameters() if not p.requires_grad}
    for name, tensor in rest.items():
        if name in saved:
            tensor.copy_(saved[name])
