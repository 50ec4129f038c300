"""Why a stage does not fit, and the smallest change with which it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from smalti.workflows.plan.base import size_text
from smalti.workflows.plan.devices import cannot_share
from smalti.workflows.plan.trial import Setting

if TYPE_CHECKING:
    from smalti.workflows.plan.training import TrainPlan

MORE_GPUS = (2, 4, 8, 16, 32)
"""How many times as many GPUs are tried."""


def refusal(plan: TrainPlan) -> str:
    """The message for a plan that does not fit."""
    name = plan.model.name
    rates = plan.rates
    total = sum(plan.memory.values())
    if total <= plan.usable:
        needs = plan.host(plan.setting)
        share = plan.usable_host / rates.host
        return (
            f"{name} puts {size_text(sum(needs.values()))} into main memory for each {rates.device} "
            f"({_sizes(needs)}), of {size_text(rates.host)} ({share:.0%} to plan with, ASSUMED). "
            f"{_smaller_window(plan) or _fix(plan)}"
        )
    return (
        f"{name} needs {size_text(total)} on each {rates.device}, of {size_text(rates.memory)} "
        f"({size_text(plan.usable)} to plan with): {_sizes(plan.memory)}. {_fix(plan)}"
    )


def _sizes(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items() if size)


def _smaller_window(plan: TrainPlan) -> str:
    """The `data_gb`, in tenths, with which main memory suffices; "" if there is none."""
    parts = plan.host(plan.setting)
    train = plan.model.train
    spare = plan.usable_host - parts["batches"] - parts["offload"]
    tenths = math.floor(10 * train.data_gb * spare / parts["shards"])
    if tenths < 1:
        return ""
    key = f"{plan.model.section}.data_gb={tenths / 10:g}"
    return f"With {key} it fits (a window that takes more is read again)."


def _fix(plan: TrainPlan) -> str:
    """The smallest change that fits: one alone, else several, else more GPUs."""
    key = plan.model.section
    found = next((setting for setting in _smallest_first(plan) if plan.fits(setting)), None)
    if found is None:
        return (
            "Nothing that is tried here makes it fit: not ZeRO-3 with "
            f"{key}.micro_batch_size=1 either."
        )
    size = size_text(sum(plan.trial.memory(found).values()))
    beside = ""
    if found.offload:
        beside = f" (and {size_text(plan.offloaded(found))} of main memory for each)"
    return f"With {' and '.join(_changes(plan, found))} it is {size}{beside}, and fits."


def _smallest_first(plan: TrainPlan) -> Iterator[Setting]:
    """Settings to try, the smallest change first."""
    now = plan.setting
    train = plan.model.train
    smaller = [replace(now, micro=micro) for micro in _divisors(now.micro)]
    shared = [replace(now, zero=stage) for stage in range(now.zero + 1, 4)]
    both = [replace(one, zero=3) for one in [now, *smaller]]
    yield from [*smaller, *shared, *both]
    for one in [now, *smaller, *shared, *both]:
        yield replace(one, checkpointing=True)
    if train.optimizer != "muon":
        for one in both:
            yield replace(one, offload=True)
    for times in MORE_GPUS:
        num = plan.num * times
        if train.batch_size % num == 0 and not cannot_share(plan.others, num):
            more = replace(both[0], num=num, micro=1)
            yield more
            yield replace(more, checkpointing=True)


def _changes(plan: TrainPlan, found: Setting) -> list[str]:
    """Keys and options that turn the recipe's setting into the found one."""
    key = plan.model.section
    now = plan.setting
    train = plan.model.train
    changes = {
        f"{key}.optimizer=adamw": found.zero != now.zero and train.optimizer == "muon",
        f"{key}.zero_stage={found.zero}": found.zero != now.zero,
        f"{key}.micro_batch_size={found.micro}": found.micro != now.micro,
        f"{key}.activation_checkpointing=true": found.checkpointing and not now.checkpointing,
        f"{key}.offload=cpu": found.offload and not now.offload,
        f"--gpus {found.num}": found.num != now.num,
    }
    return [text for text, changed in changes.items() if changed]


def _divisors(micro: int) -> list[int]:
    """Smaller divisors of a micro batch, the largest first."""
    return [part for part in range(micro // 2, 0, -1) if micro % part == 0]
