"""DeepSpeed engines: configuration, optimizer, learning rate, full weights.

Torch alone decides the maths of a step.

No DeepSpeed op is compiled: the optimizer is torch's AdamW and collectives are torch.distributed's.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smalti.errors import ConfigError
from smalti.mllm.losses import LossHead
from smalti.workflows.train import deepspeed_compat
from smalti.workflows.train.memory import offload, spare_memory
from smalti.workflows.train.optimizers import build_optimizer

if TYPE_CHECKING:
    from smalti.schema import Train

REDUCE_BUCKET = 500_000_000  # DeepSpeed's own size, in numbers
STAGE_3: dict[str, Any] = {  # in numbers, DeepSpeed's own sizes
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
SENT_LOW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, LossHead)
"""Layers whose weights and gradients ZeRO sends in bf16 under `train.precision: bf16`; those that
compute in it.
"""


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Within, `package` does not import, unless it is imported already."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


def prepare_process(use_gpu: bool, num_threads: int) -> None:
    """Settings of a worker process; call before DeepSpeed is imported for the first time."""
    if use_gpu:
        os.environ.pop(
            "DS_ACCELERATOR", None
        )  # set by a run without GPUs in the process that started Ray
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(num_threads)
    with _without(
        "mlflow"
    ):  # DeepSpeed's autotuner would import all of it (a second of start-up); rank 0 logs elsewhere
        import deepspeed.ops
    deepspeed_compat.check_version(deepspeed.__version__)
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Looking at this attribute probes compilers and builds an op for shared-memory collectives (50
    # s); gloo and nccl do.
    vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)


def accumulation(train: Train, world_size: int) -> tuple[int, int]:
    """(samples of a micro batch, accumulation steps) of one worker; ConfigError unless all divide
    evenly.
    """
    if train.batch_size % world_size:
        raise ConfigError(
            f"train.batch_size={train.batch_size} does not divide among resources.workers={world_size}. "
            f"Set train.batch_size to a multiple of {world_size}, or change resources.workers."
        )
    share = train.batch_size // world_size
    micro = min(train.micro_batch_size or share, share)
    if share % micro:
        raise ConfigError(
            f"a worker's share of the batch is {share} samples ({train.batch_size} / {world_size}), which "
            f"train.micro_batch_size={micro} does not divide. Set it to a divisor of {share}."
        )
    return micro, share // micro


def learning_rate(train: Train, step: int, peak: float | None = None) -> float:
    """Rate of a step, counted from 0: linear warmup, then constant, or cosine down to `min_lr`
    times the peak.

    `warmup` below 1 is a fraction of the steps, else a number of steps.
    """
    peak = train.lr if peak is None else peak
    warmup = train.warmup * train.steps if train.warmup < 1 else train.warmup
    if step < warmup:
        return peak * (step + 1) / (math.floor(warmup) + 1)
    if train.schedule == "constant":
        return peak
    done = (step - warmup) / max(1.0, train.steps - warmup)
    return peak * (
        train.min_lr + (1 - train.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    )


def deepspeed_config(
    train: Train, world_size: int, *, zero_stage: int | None = None, trained: int | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration of one engine.

    Parameters stay float32; bf16 is autocast, so that what must be float32 (codebooks, losses,
    norms) stays so; ZeRO sends gradients, and ZeRO-3 weights, of `SENT_LOW` in bf16.

    `trained`: how many numbers are trained; ZeRO holds a bucket for gradients that need be no
    larger than all of them.
    """
    micro, steps = accumulation(train, world_size)
    stage = train.zero_stage if zero_stage is None else zero_stage
    config: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": float(train.clip),
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    if stage and trained is not None:
        config["zero_optimization"]["reduce_bucket_size"] = max(1, min(trained, REDUCE_BUCKET))
    if stage == 3:
        config["zero_optimization"] |= STAGE_3 | {
            "stage3_gather_16bit_weights_on_model_save": False
        }
    config["zero_optimization"] |= offload(train, stage)
    if stage and train.offload == "cpu":
        config["zero_force_ds_cpu_optimizer"] = (
            False  # torch's AdamW updates what lies in main memory
        )
    if train.precision == "bf16":
        names = [f"{layer.__module__}.{layer.__qualname__}" for layer in SENT_LOW]
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": names,
        }
    return config


def build_engine(
    module: nn.Module,
    train: Train,
    *,
    lr: float,
    zero_stage: int,
    world_size: int,
    device: torch.device,
):
    """A DeepSpeed engine around `module`; weights are those of rank 0 on every rank."""
    import deepspeed

    spare_memory(module, train)
    optimizer = build_optimizer(module.to(device), train, lr, device)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
    config = deepspeed_config(train, world_size, zero_stage=zero_stage, trained=trained)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the rate of every group: the schedule is a function of the step, nothing of it needs
    saving.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def set_factors(engine: Any, factors: Mapping[Any, float]) -> None:
    """Factors on the rate of the groups that stand for a part of the module; call it before
    `set_learning_rate`.
    """
    for group in engine.optimizer.param_groups:
        if "part" in group:
            group["factor"] = factors[group["part"]]


@torch.no_grad()
def forget_moments(engine: Any, parts: Collection[str]) -> None:
    """Let the optimizer begin anew with the groups of these parts, under any ZeRO stage: moments
    and count of steps 0.

    After a rest the moments have faded but the count went on: Adam would take them for means over
    all those steps, and make steps several times the rate.
    """
    for group, parameter in _held(engine):
        if group.get("part") in parts:
            for name, value in _inner(engine).state.get(parameter, {}).items():
                if name == "step":  # not in place: parameters may share one
                    _inner(engine).state[parameter][name] = torch.zeros_like(value)
                else:
                    value.zero_()


def _inner(engine: Any) -> torch.optim.Optimizer:
    """Torch's optimizer in an engine."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _held(engine: Any) -> list[tuple[dict[str, Any], Any]]:
    """What torch's optimizer has states of (parameters, or ZeRO's flat pieces), each with its
    group.
    """
    groups = _inner(engine).param_groups
    if engine.zero_optimization_stage() == 3:  # whose groups are filled during a step only
        pieces = enumerate(engine.optimizer.fp32_partitioned_groups_flat)
        return [
            (groups[engine.optimizer.sub_group_to_group_id[number]], piece)
            for number, piece in pieces
        ]
    return [(group, parameter) for group in groups for parameter in group["params"]]


def full_weights(engine: Any, *, on_this_rank: bool) -> dict[str, torch.Tensor] | None:
    """The whole state dict on the CPU where `on_this_rank`, None elsewhere; under ZeRO-3 gathered
    one parameter at a time, so that a rank never holds more than the model.

    Every rank must call it.
    """
    import deepspeed

    module = engine.module
    if engine.zero_optimization_stage() < 3:
        return (
            {name: t.detach().cpu().clone() for name, t in module.state_dict().items()}
            if on_this_rank
            else None
        )
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if on_this_rank:
                weights[name] = parameter.detach().cpu().clone()
    if not on_this_rank:
        return None
    state = module.state_dict()
    return {
        name: weights[name] if name in weights else t.detach().cpu().clone()
        for name, t in state.items()
    }


@torch.no_grad()
def set_parameter(engine: Any, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a trained parameter a new value (whole, the same on every rank) under any ZeRO stage;
    its moments become 0.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        parameter.copy_(value)
        for name, moment in engine.optimizer.state.get(parameter, {}).items():
            if name != "step":  # one count for all parameters under ZeRO, so it stays here too
                moment.zero_()
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.to(parameter.device, torch.float32)
    safe_set_full_fp32_param(parameter, value)
    if engine.global_steps:  # before the first step there are no moments yet
        if (
            stage < 3
        ):  # those of a loaded checkpoint are else linked to their parameters in the next step only
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, torch.zeros_like(value), name)
    if stage < 3:
        parameter.copy_(value)
    else:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
