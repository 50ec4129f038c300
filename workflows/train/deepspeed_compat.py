"""Internals of DeepSpeed's optimizers that training depends on, in one place.

DeepSpeed has no public call that returns the gradient's norm before a step, nor one that skips a
step. What is used instead was read in the versions of `KNOWN`; `check_version` refuses others, and
a test checks that the names exist.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from smalti.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

KNOWN = ((0, 19),)
"""(major, minor) versions whose optimizers have these internals."""


class Engine(Protocol):
    """What training uses of a DeepSpeed engine."""

    module: nn.Module
    optimizer: DeepSpeedOptimizer
    device: torch.device
    global_steps: int

    def __call__(self, *inputs: object, **named: object) -> Any:
        """What the module's forward returns."""

    def train(self) -> None: ...

    def eval(self) -> None: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...

    def zero_optimization_stage(self) -> int: ...

    def save_checkpoint(self, folder: str, *, tag: str) -> None: ...

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str | None, object]: ...


def check_version(version: str) -> None:
    """Refuse a DeepSpeed whose internals are not known.

    Raises:
        ConfigError: naming the version found and those known.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) not in KNOWN:
        known = ", ".join(f"{major}.{minor}.x" for major, minor in KNOWN)
        raise ConfigError(
            f"DeepSpeed {version} is installed, but training knows the optimizers of {known} only. Install it with "
            "`pip install -c requirements.lock deepspeed`."
        )


def gradient_norm(engine: Engine) -> float:
    """L2 norm of an engine's gradient, averaged over workers, before clipping.

    Every worker calls it, after the last backward of a step and before `apply`.

    Returns:
        The norm, equal on all workers; inf if it is not finite.
    """
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    elif stage < 3:
        optimizer._wait_for_offload_copies()
        norm = float(optimizer.scaled_global_norm())
    else:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm = float(combine_grad_norm_groups(optimizer._get_norm_groups()))
    return norm if math.isfinite(norm) and norm >= 0 else math.inf


def apply(engine: Engine, norm: float) -> None:
    """Step an engine whose gradient has this norm.

    With norm inf the gradient is discarded; weights, moments and their step count keep their
    values.
    """
    stage = engine.zero_optimization_stage()
    with _stepping(engine.optimizer, stage, norm):
        engine.step()


@contextmanager
def _stepping(optimizer: DeepSpeedOptimizer, stage: int, norm: float) -> Iterator[None]:
    """Make the optimizer use `norm` as the gradient's norm; for inf, take its path for overflows."""
    patches: dict[str, object] = {}
    if stage == 0:
        if not math.isfinite(norm):
            patches["step"] = lambda *args, **kwargs: None
    elif stage < 3:
        patches["scaled_global_norm"] = lambda norm_type=2: torch.tensor(norm)
        if not math.isfinite(norm):
            patches["check_grad_overflow"] = True
            patches["check_overflow"] = lambda partition_gradients=True: setattr(
                optimizer, "overflow", True
            )
    else:
        patches["_get_norm_groups"] = lambda: [torch.tensor(norm)]
    before = {name: vars(optimizer)[name] for name in patches if name in vars(optimizer)}
    vars(optimizer).update(patches)
    try:
        yield
    finally:
        for name in patches:
            del vars(optimizer)[name]
        vars(optimizer).update(before)
