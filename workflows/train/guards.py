"""Guards of a training step: NaN or Inf in losses and gradients, and weights that differ between
workers.

A step with a loss or a gradient that is not finite is skipped as a whole: no engine moves, on any
worker. A loss that is not finite makes every gradient NaN, so that workers agree without a
collective of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smalti.errors import TrainingError
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.deepspeed_compat import Engine, is_replicated
from smalti.workflows.train.task import Metrics

if TYPE_CHECKING:
    from smalti.schema import Train

CHECKSUM_CHUNK = 1 << 22  # words of 4 bytes looked at in one go


class NotFiniteError(TrainingError):
    """Too many steps in a row were passed over; all workers find out in the same step."""


class DriftError(TrainingError):
    """What must be the same on every worker is not; all workers find out in the same step."""


def poisoned(loss: Tensor) -> Tensor:
    """The loss as it is, and NaN with NaN gradients where it is not finite (an infinite one may
    have finite ones).
    """
    finite = torch.isfinite(loss.detach())
    return loss * torch.where(finite, 1.0, float("nan")).to(loss.dtype)


def not_finite(step: int, train: Train, rate: float, found: Sequence[Metrics]) -> NotFiniteError:
    """The error that ends a run at `step` (from 0), after too many steps were passed over; `found`:
    its last metrics.
    """
    last, first = step + 1, step + 1 - train.max_skipped
    which = f"step {last}" if first == last else f"steps {first} to {last}"
    seen = [
        f"{name} {float(value):.4g}"
        for metrics in found
        for name, value in metrics.items()
        if name == "loss" and not isinstance(value, tuple)
    ]
    return NotFiniteError(
        f"the loss or the gradient of {which} of {train.steps} is not finite (batch of {train.batch_size}, rate "
        f"{rate:.3g}, {train.precision}{', ' + seen[0] if seen else ''} on this worker), and train.max_skipped="
        f"{train.max_skipped} in a row are passed over. Weights and checkpoints are from before it. Lower train.lr="
        f"{train.lr:g}, lengthen train.warmup={train.warmup:g}, set train.clip, or use train.precision=fp32."
    )


class SkipCount:
    """Counts steps passed over: in all, and in a row up to `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.total, self.in_row = most, 0, 0

    def note(self, skipped: bool) -> bool:
        """Count a step; True when too many in a row were passed over."""
        self.total += skipped
        self.in_row = self.in_row + 1 if skipped else 0
        return self.in_row > self.most

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_row": self.in_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.total, self.in_row = state["total"], state["in_row"]


def checksum(tensor: Tensor) -> Tensor:
    """A sum over a tensor's bytes and their places: int64 scalar on its device.

    Tensors of other bytes share it with a chance of about 2⁻³¹; no float is rounded on the way.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHECKSUM_CHUNK):
        part = words[start : start + CHECKSUM_CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(part), device=tensor.device, dtype=torch.int64)
        total += (part * (places * 2_654_435_761 + 1_013_904_223)).sum()  # wraps round at 64 bits
    return total


def replicated(engines: Mapping[str, Engine]) -> dict[str, Tensor]:
    """Weights and buffers by name that every worker has whole, so that they can diverge.

    Below ZeRO-3 these are all; under it buffers (EMA codebooks), and weights that are too small to
    be partitioned.
    """
    found: dict[str, Tensor] = {}
    for name, engine in engines.items():
        tensors: dict[str, Tensor] = dict(engine.module.named_parameters())
        tensors |= dict(engine.module.named_buffers())
        for key, tensor in tensors.items():
            if is_replicated(tensor):
                found[f"{name}'s {key}"] = tensor
    return found


def check_same(tensors: Mapping[str, Tensor], collectives: Collectives, step: int) -> None:
    """DriftError on every worker, with the tensor's name and the ranks that stand alone, unless
    each tensor has the same bytes on all workers.

    Every worker calls it with the same names.
    """
    if collectives.world_size == 1 or not tensors:
        return
    names = sorted(tensors)
    sums_1N = torch.stack([checksum(tensors[name]) for name in names])[None]
    for name, sums_W in zip(names, collectives.all_gather(sums_1N).T.tolist(), strict=True):
        if len(set(sums_W)) == 1:
            continue
        common = max(sums_W, key=lambda value: (sums_W.count(value), -sums_W.index(value)))
        others = [rank for rank, value in enumerate(sums_W) if value != common]
        raise DriftError(
            f"{name} must be the same on all {len(sums_W)} workers, and after step {step} it differs on rank(s) "
            f"{', '.join(map(str, others))} from what rank {sums_W.index(common)} holds. A worker's memory or a "
            "collective is at fault: look at the machines of these ranks. The same command goes on from the newest "
            "checkpoint; if that is later than the drift, remove it first."
        )
