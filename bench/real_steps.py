"""A training step of each stage with real numbers, and what it takes: the other side of `smalti
plan`'s figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from smalti.schema import Recipe
from smalti.workflows.plan.models import Model
from smalti.workflows.systems.registry import system_of
from smalti.workflows.train.optimizers import build_optimizer


class Measured(NamedTuple):
    """Bytes that stay (weights, buffers, gradients, moments), the peak of a further micro batch
    beyond them, and the CPU seconds of one.
    """

    stays: int
    passing: int
    seconds: float


def size(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def peak_of(call: Callable[[], None]) -> int:
    """Most bytes that torch's allocator held at once in a call beyond those before it, by its own
    record.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    live = peak = 0
    record: Any = found.profiler
    events = [
        (e.start_ns(), e.nbytes()) for e in record.kineto_results.events() if e.name() == "[memory]"
    ]
    for _, change in sorted(events, key=lambda event: event[0]):
        live += change
        peak = max(peak, live)
    return peak


def real_step(model: Model, batch: int) -> Callable[[], None]:
    """A micro batch of the stage's task with real numbers, forward and backward."""
    bf16 = model.train.precision == "bf16"
    step = model.step(batch)

    def run() -> None:
        model.task.skipped(0)  # as a step ends
        step(torch.Tensor.backward, lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16))

    return run


def fill(model: Model) -> nn.ModuleDict:
    """The model's modules, moved to the CPU with random numbers."""
    modules = model.modules.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*modules.parameters(), *modules.buffers()]:
            tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    return modules


def measure(recipe: Recipe, batch: int, turns: int = 0) -> dict[str, Measured]:
    """Every stage of the recipe that trains, on this CPU, with random weights; `turns` more micro
    batches are timed.
    """
    found = {}
    torch.manual_seed(0)
    for model in system_of(recipe).planned_models(recipe):
        modules = fill(model)
        step = real_step(model, batch)
        optimizers = [
            build_optimizer(modules[name], model.train, 1e-4, torch.device("cpu"))
            for name in model.engines
        ]
        step()
        for optimizer in optimizers:
            optimizer.step()
        trained = [
            p for name in model.engines for p in modules[name].parameters() if p.requires_grad
        ]
        moments = [
            v
            for o in optimizers
            for s in o.state.values()
            for v in s.values()
            if isinstance(v, Tensor)
        ]
        stays = size(
            [*modules.parameters(), *modules.buffers(), *(p.grad for p in trained), *moments]
        )
        passing = peak_of(step)
        started = time.process_time()
        for _ in range(turns):
            step()
        found[model.name] = Measured(
            stays, passing, (time.process_time() - started) / max(turns, 1)
        )
        del optimizers, moments, trained, step
    return found
