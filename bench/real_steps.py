"""A training step of each stage with real numbers, and what it takes: the other side of `smalti
plan`'s figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from smalti.schema import Recipe
from smalti.tokenizers.losses import discriminator_loss
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
    """A micro batch of the stage with its own modules and real numbers, forward and backward, as
    its task makes it.
    """
    modules, side = model.modules, model.pixels
    criterion: Any = dict(modules.items()).get("criterion")
    main, bf16 = modules["model"], model.train.precision == "bf16"

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    def encoder() -> Tensor:
        with autocast():
            return main(torch.rand(batch, 3, side, side), torch.arange(8 * batch).view(batch, 8))[0]

    def semantic() -> Tensor:
        with torch.no_grad():
            features = modules["encoder"](torch.rand(batch, 3, side, side))
        with autocast():
            return main(features)[0]

    def pixel() -> Tensor:
        pixels = torch.rand(batch, 3, side, side)
        with torch.no_grad():
            ids = modules["semantic"].encode(modules["encoder"](pixels))  # type: ignore[operator]
        with autocast():
            out = main(pixels, ids)
        more = (
            out.vq_loss
            if out.semantic_only is None
            else out.vq_loss + criterion(out.semantic_only, pixels)[0]
        )
        return rebuilt(out.pixels, pixels, more)

    def dual() -> Tensor:
        pixels = torch.rand(batch, 3, side, side)
        with torch.no_grad():
            features = modules["encoder"](pixels)
        with autocast():
            out = main(pixels, features)
        return rebuilt(out.pixels, pixels, out.semantic + out.commitment)

    def rebuilt(made: Tensor, pixels: Tensor, more: Tensor) -> Tensor:
        """The losses of rebuilt images and the model's own; with a discriminator they are backward
        already.
        """
        critic = dict(modules.items()).get("discriminator")
        loss = (
            criterion(made, pixels, discriminator=critic, last_layer=main.last_layer, step=10**9)[0]
            + more
        )
        if critic is None:
            return loss
        loss.backward()
        with autocast():
            return discriminator_loss(critic, made.detach(), pixels)[0]

    def mllm() -> Tensor:
        assert model.head is not None
        ids = torch.randint(model.head.rows - 8, (batch, model.head.length))
        if model.head.depths:  # every position a place
            ids = torch.full_like(ids, int(main.vocabulary.first_visual))  # type: ignore[union-attr]
        same = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        same |= {
            name: torch.zeros_like(ids) for name in ("document_ids", "segment_ids", "position_ids")
        }
        if model.head.depths:
            same["codes"] = torch.randint(
                model.head.codes, (ids.numel(), 2, model.head.depths // 2)
            )
        main.loss_chunk = model.head.chunk  # type: ignore[assignment]
        with autocast():
            return main(same)[0]

    loss = {"encoder": encoder, "semantic": semantic, "pixel": pixel, "dual": dual, "mllm": mllm}[
        model.name
    ]
    return lambda: loss().backward()


def measure(recipe: Recipe, batch: int, turns: int = 0) -> dict[str, Measured]:
    """Every stage of the recipe that trains, on this CPU, with random weights; `turns` more micro
    batches are timed.
    """
    found = {}
    torch.manual_seed(0)
    for model in system_of(recipe).planned_models(recipe):
        modules = model.modules.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in [*modules.parameters(), *modules.buffers()]:
                tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
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
