"""Internals of DeepSpeed that training depends on, in one place.

DeepSpeed has no public call that returns the gradient's norm before a step, skips a step, resets
the optimizer's states, or creates a partitioned parameter without its whole. What is used instead
was read in the versions of `KNOWN`; `check_version` refuses others, and a test checks that the
names exist.

Axes: P numbers of this rank's part of a parameter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from smalti.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.partition_parameters import Init

KNOWN = ((0, 19),)
"""(major, minor) versions that have these internals."""

ParamGroup = dict[str, Any]
"""A parameter group of a torch optimizer."""


class Engine(Protocol):
    """What training uses of a DeepSpeed engine."""

    module: nn.Module
    optimizer: DeepSpeedOptimizer
    device: torch.device
    global_steps: int
    _config: DeepSpeedConfig

    def __call__(self, *inputs: object, **named: object) -> Any:
        """What the module's forward returns."""

    def train(self) -> None: ...

    def eval(self) -> None: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...

    def zero_optimization_stage(self) -> int: ...

    def save_checkpoint(self, folder: str, *, tag: str) -> None: ...

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str | None, object]: ...


def import_deepspeed() -> None:
    """Import DeepSpeed without its side effects: MLflow, probes of its ops, log lines.

    Raises:
        ConfigError: its version is not known.
    """
    with _hidden("mlflow"):  # its autotuner would import all of MLflow (a second of start-up)
        import deepspeed.ops
    check_version(deepspeed.__version__)
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Reading this attribute probes compilers and builds an op for collectives over shared memory
    # (50 s); gloo and nccl are used instead.
    vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Within, `package` does not import, unless it is imported already."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


def check_version(version: str) -> None:
    """Refuse a DeepSpeed whose internals are not known.

    Raises:
        ConfigError: naming the version found and those known.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) not in KNOWN:
        known = ", ".join(f"{major}.{minor}.x" for major, minor in KNOWN)
        raise ConfigError(
            f"DeepSpeed {version} is installed, but training knows the internals of {known} only. "
            "Install it with `pip install -c requirements.lock deepspeed`."
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
    """Within, the optimizer uses `norm` as the gradient's norm, and for inf skips its step."""
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


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, which ZeRO-3 may have partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: Tensor) -> int:
    """Numbers of the whole parameter, which ZeRO-3 may have partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_replicated(tensor: Tensor) -> bool:
    """Whether every worker has the whole tensor, for as long as it trains."""
    return tensor.numel() == full_numel(tensor) and getattr(tensor, "ds_persist", True)


def partition_of(parameter: Tensor) -> Tensor | None:
    """This rank's part of a parameter, (P,); None if it is not partitioned."""
    return getattr(parameter, "ds_tensor", None)


def empty_partitioned(
    init: Init, dtype: torch.dtype, shape: tuple[int, int], world_size: int
) -> nn.Parameter:
    """A partitioned matrix of zeros, as `zero.Init` makes one, without ever allocating the whole.

    Args:
        init: of the ranks that share the matrix.
        dtype: of the matrix.
        shape: of the whole matrix.
        world_size: number of these ranks.
    """
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus

    device = init.local_device
    one = torch.zeros(1, dtype=dtype, device=device)
    new: Any = nn.Parameter(one.expand(shape))  # a shape without storage
    init._convert_to_deepspeed_param(new)
    aligned = init._aligned_size(new)
    held_on = "cpu" if init.remote_device == "cpu" else device
    part_P: Any = torch.zeros(aligned // world_size, dtype=dtype, device=held_on)
    part_P.ds_numel = len(part_P)
    part_P.final_location = None
    part_P.status = PartitionedParamStatus.AVAILABLE
    new.ds_tensor = part_P
    new.ds_numel_aligned = aligned
    new.data = torch.empty(0, dtype=dtype, device=device)
    new.ds_status = ZeroParamStatus.NOT_AVAILABLE
    return new


def torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Torch's optimizer in an engine."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def optimizer_entries(engine: Engine) -> list[tuple[ParamGroup, Tensor]]:
    """What torch's optimizer has states of, each with its group.

    Without ZeRO these are parameters, under it flat buffers of many.
    """
    groups = torch_optimizer(engine).param_groups
    if engine.zero_optimization_stage() < 3:
        return [(group, parameter) for group in groups for parameter in group["params"]]
    # Under ZeRO-3 the groups are filled during a step only.
    group_of = engine.optimizer.sub_group_to_group_id
    flat = engine.optimizer.fp32_partitioned_groups_flat
    return [(groups[group_of[number]], buffer) for number, buffer in enumerate(flat)]


def link_moments(engine: Engine) -> None:
    """Make moments of a loaded checkpoint reachable by parameter, under ZeRO-1 and 2.

    DeepSpeed does so in the next step only.
    """
    engine.optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def universal_checkpoint(engine: Engine) -> Iterator[None]:
    """Within, the engine loads universal checkpoints."""
    config = engine._config
    config.load_universal_checkpoint = True
    try:
        yield
    finally:
        config.load_universal_checkpoint = False


def convert_to_universal(source: str, target: str) -> None:
    """Convert a ZeRO checkpoint to a universal one, which has each parameter whole.

    In this process: the conversion is bound by reading and writing, and prints a line per file.

    Raises:
        Exception: whatever a step of the conversion raises.
    """
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=source,
        output_folder=target,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ds_to_universal.main(arguments)
