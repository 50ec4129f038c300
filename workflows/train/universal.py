"""ZeRO states of another number of workers: DeepSpeed's universal checkpoint, which holds each parameter whole.

Made once a machine, by the first of its workers; then each worker takes its part.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from smalti.errors import TrainingError
from smalti.workflows.train.collectives import Collectives

CONVERTED = "universal"


def load(engine: Any, folder: str, tag: str, collectives: Collectives) -> None:
    """Load `folder`/`tag`, a checkpoint of a ZeRO engine by another number of workers; every worker calls it."""
    with _converted(folder, tag, collectives) as made:
        optimizer = engine.optimizer.optimizer
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        engine._config.load_universal_checkpoint = True
        try:
            loaded, _ = engine.load_checkpoint(made, tag=CONVERTED)
        finally:
            engine._config.load_universal_checkpoint = False
        if loaded is None:
            raise TrainingError(f"DeepSpeed could not load the checkpoint {folder} as a universal one; remove it.")
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)  # DeepSpeed gives all groups the decay of the first
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()  # one tensor for all of them would count several times a step
        _load_rest(engine, os.path.join(folder, tag))


@contextlib.contextmanager
def _converted(folder: str, tag: str, collectives: Collectives) -> Iterator[str]:
    """A folder of this machine that holds the universal checkpoint while the workers load it."""
    made = os.path.join(tempfile.gettempdir(), f"smalti-universal-{hashlib.sha1(folder.encode()).hexdigest()[:16]}")
    first = int(os.environ.get("LOCAL_RANK", collectives.rank)) == 0
    try:
        if first:
            shutil.rmtree(made, ignore_errors=True)
            os.makedirs(made)
            _convert(os.path.join(folder, tag), os.path.join(made, CONVERTED))
        collectives.barrier()
        yield made
        collectives.barrier()
    finally:
        if first:
            shutil.rmtree(made, ignore_errors=True)


def _convert(source: str, target: str) -> None:
    """DeepSpeed's own conversion, in this process: it is bound by reading and writing, and prints a line a file."""
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
    except Exception as error:  # whatever its many steps raise: the mend is the same
        raise TrainingError(
            f"DeepSpeed could not make a universal checkpoint of {source} for another number of workers: "
            f"{type(error).__name__}: {error}. Start with the number of workers that wrote it."
        ) from error


@torch.no_grad()
def _load_rest(engine: Any, folder: str) -> None:
    """Buffers, which a universal checkpoint leaves out, and below ZeRO-3 the frozen parameters; the same on every
    worker that wrote it, so the first file has them all."""
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
