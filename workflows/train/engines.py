"""DeepSpeed engines: configuration, optimizer, learning rate, full weights.

Torch alone decides the maths of a step: no DeepSpeed op is compiled, the optimizer is torch's
AdamW, and collectives are torch.distributed's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from smalti.errors import ConfigError
from smalti.mllm.losses import LossHead
from smalti.workflows.train import deepspeed_compat
from smalti.workflows.train.deepspeed_compat import Engine
from smalti.workflows.train.memory import offload, spare_memory
from smalti.workflows.train.optimizers import build_optimizer

if TYPE_CHECKING:
    from smalti.schema import Train

PartName = TypeVar("PartName", bound=str)

DeepSpeedConfig = dict[str, Any]
"""DeepSpeed's configuration, as its JSON file would have it."""

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default size, in numbers."""
STAGE_3 = {
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""DeepSpeed's default sizes, in numbers."""
SENT_LOW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, LossHead)
"""Layers that compute in bf16 under `train.precision: bf16`.

ZeRO sends their weights and gradients in bf16.
"""


def prepare_process(use_gpu: bool, num_threads: int) -> None:
    """Set up a worker process; call it before DeepSpeed is imported for the first time."""
    if use_gpu:
        # Set by a run without GPUs in the process that started Ray.
        os.environ.pop("DS_ACCELERATOR", None)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(num_threads)
    deepspeed_compat.import_deepspeed()


def accumulation(train: Train, world_size: int) -> tuple[int, int]:
    """Micro batches of one worker.

    Returns:
        Samples per micro batch, and micro batches per step.

    Raises:
        ConfigError: the batch does not divide evenly.
    """
    if train.batch_size % world_size:
        raise ConfigError(
            f"train.batch_size={train.batch_size} does not divide among "
            f"resources.workers={world_size}. Set train.batch_size to a multiple of {world_size}, "
            "or change resources.workers."
        )
    share = train.batch_size // world_size
    micro = min(train.micro_batch_size or share, share)
    if share % micro:
        raise ConfigError(
            f"a worker's share of the batch is {share} samples ({train.batch_size} / "
            f"{world_size}), which train.micro_batch_size={micro} does not divide. Set it to a "
            f"divisor of {share}."
        )
    return micro, share // micro


def learning_rate(train: Train, step: int, peak: float | None = None) -> float:
    """Learning rate of a step, counted from 0.

    A linear warmup, then constant, or a cosine down to `min_lr` times the peak. `warmup` below 1 is
    a fraction of the steps, else a number of steps.
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
) -> DeepSpeedConfig:
    """DeepSpeed's configuration of one engine.

    Parameters stay float32; bf16 is autocast, so that what must be float32 (codebooks, losses,
    norms) stays so. ZeRO sends gradients, and ZeRO-3 weights, of `SENT_LOW` in bf16.

    Args:
        train: the recipe's settings.
        world_size: number of workers.
        zero_stage: of the engine; default that of `train`.
        trained: numbers that are trained. ZeRO's bucket for gradients is no larger than that.
    """
    micro, steps = accumulation(train, world_size)
    stage = train.zero_stage if zero_stage is None else zero_stage
    config: DeepSpeedConfig = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": float(train.clip),
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero_config(train, stage, trained),
    }
    if stage and train.offload == "cpu":
        # torch's AdamW updates what is in main memory.
        config["zero_force_ds_cpu_optimizer"] = False
    if train.precision == "bf16":
        names = [f"{layer.__module__}.{layer.__qualname__}" for layer in SENT_LOW]
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": names,
        }
    return config


def _zero_config(train: Train, stage: int, trained: int | None) -> DeepSpeedConfig:
    config: DeepSpeedConfig = {"stage": stage}
    if stage and trained is not None:
        config["reduce_bucket_size"] = max(1, min(trained, REDUCE_BUCKET))
    if stage == 3:
        config |= STAGE_3
        config["stage3_gather_16bit_weights_on_model_save"] = False
    return config | offload(train, stage)


def build_engine(
    module: nn.Module,
    train: Train,
    *,
    lr: float,
    zero_stage: int,
    world_size: int,
    device: torch.device,
) -> Engine:
    """A DeepSpeed engine around `module`; every rank gets the weights of rank 0."""
    import deepspeed

    spare_memory(module, train)
    optimizer = build_optimizer(module.to(device), train, lr, device)
    trained = sum(deepspeed_compat.full_numel(p) for p in module.parameters() if p.requires_grad)
    config = deepspeed_config(train, world_size, zero_stage=zero_stage, trained=trained)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Set the learning rate of every group.

    The schedule is a function of the step, so nothing of it is in a checkpoint.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def set_factors(engine: Engine, factors: Mapping[PartName, float]) -> None:
    """Set factors on the learning rate of a module's parts; call it before `set_learning_rate`."""
    for group in engine.optimizer.param_groups:
        if "part" in group:
            group["factor"] = factors[group["part"]]


@torch.no_grad()
def forget_moments(engine: Engine, parts: Collection[str]) -> None:
    """Reset the optimizer's states of these parts: moments and step count to 0.

    While a part is frozen its moments fade, but its step count increases: Adam would then take them
    for means over all those steps, and make steps several times the learning rate.
    """
    optimizer = deepspeed_compat.torch_optimizer(engine)
    for group, parameter in deepspeed_compat.optimizer_entries(engine):
        if group.get("part") in parts:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if name == "step":  # not in place: parameters may share one
                    state[name] = torch.zeros_like(value)
                else:
                    value.zero_()


def full_weights(engine: Engine, *, on_this_rank: bool) -> dict[str, torch.Tensor] | None:
    """The whole state dict on the CPU; every rank calls it.

    Under ZeRO-3 it is gathered one parameter at a time, so that a rank never has more than the
    model.

    Returns:
        The state dict where `on_this_rank`, else None.
    """
    gathered = _gathered(engine, on_this_rank) if engine.zero_optimization_stage() == 3 else {}
    if not on_this_rank:
        return None
    return {
        name: gathered[name] if name in gathered else tensor.detach().cpu().clone()
        for name, tensor in engine.module.state_dict().items()
    }


def _gathered(engine: Engine, on_this_rank: bool) -> dict[str, torch.Tensor]:
    """Whole parameters under ZeRO-3, on the CPU; {} unless `on_this_rank`."""
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if on_this_rank:
                weights[name] = parameter.detach().cpu().clone()
    return weights


@torch.no_grad()
def set_parameter(engine: Engine, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a trained parameter a new value under any ZeRO stage; its moments become 0.

    Args:
        engine: of the parameter.
        parameter: to change.
        value: the whole value, the same on every rank.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        parameter.copy_(value)
        for name, moment in engine.optimizer.state.get(parameter, {}).items():
            if name != "step":  # under ZeRO all parameters share one count: keep it here too
                moment.zero_()
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.to(parameter.device, torch.float32)
    safe_set_full_fp32_param(parameter, value)
    if engine.global_steps:  # before the first step there are no moments yet
        if stage < 3:
            deepspeed_compat.link_moments(engine)
        for name in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, torch.zeros_like(value), name)
    if stage < 3:
        parameter.copy_(value)
    else:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
