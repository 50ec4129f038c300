"""Guards of a training step: losses and gradients that are not finite, workers that diverge.

A step with NaN or Inf in a loss or a gradient is skipped as a whole: no engine is stepped, on any
worker. A loss that is not finite makes every gradient NaN, so workers agree without a collective of
their own.
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

CHECKSUM_CHUNK = 1 << 22
"""Words of 4 bytes that are summed at once."""


class NotFiniteError(TrainingError):
    """Too many steps in a row were skipped.

    All workers raise it in the same step.
    """


class DriftError(TrainingError):
    """A tensor that must be the same on every worker is not.

    All workers raise it in the same step.
    """


def poisoned(loss: Tensor) -> Tensor:
    """The loss itself, or NaN with NaN gradients where it is not finite.

    An infinite loss may have finite gradients.
    """
    finite = torch.isfinite(loss.detach())
    return loss * torch.where(finite, 1.0, float("nan")).to(loss.dtype)


def not_finite(step: int, train: Train, rate: float, found: Sequence[Metrics]) -> NotFiniteError:
    """The error that ends a run after too many skipped steps.

    Args:
        step: the last of them, from 0.
        train: the recipe's settings.
        rate: learning rate of that step.
        found: metrics of its micro batches on this worker.
    """
    last = step + 1
    first = last - train.max_skipped
    which = f"step {last}" if first == last else f"steps {first} to {last}"
    losses = [metrics["loss"] for metrics in found if "loss" in metrics]
    shown = [f", loss {float(loss):.4g}" for loss in losses if not isinstance(loss, tuple)]
    return NotFiniteError(
        f"the loss or the gradient of {which} of {train.steps} is not finite (batch of "
        f"{train.batch_size}, rate {rate:.3g}, {train.precision}{''.join(shown[:1])} on this "
        f"worker), and at most train.max_skipped={train.max_skipped} steps in a row are skipped. "
        f"Weights and checkpoints are from before it. Lower train.lr={train.lr:g}, lengthen "
        f"train.warmup={train.warmup:g}, set train.clip, or use train.precision=fp32."
    )


class SkipCount:
    """Counts skipped steps: in all, and in a row.

    Args:
        most: steps in a row that may be skipped.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.total = 0
        self.in_row = 0

    def note(self, skipped: bool) -> bool:
        """Count a step; True if too many in a row were skipped."""
        self.total += skipped
        self.in_row = self.in_row + 1 if skipped else 0
        return self.in_row > self.most

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_row": self.in_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.total = state["total"]
        self.in_row = state["in_row"]


def checksum(tensor: Tensor) -> Tensor:
    """A sum over a tensor's bytes and their places: int64 scalar on its device.

    Two different tensors share it with a probability of about 2⁻³¹. Nothing is rounded: it works on
    bytes.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHECKSUM_CHUNK):
        chunk = words[start : start + CHECKSUM_CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(chunk), device=tensor.device, dtype=torch.int64)
        total += (chunk * (places * 2_654_435_761 + 1_013_904_223)).sum()  # wraps round at 64 bits
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
    """Check that each tensor has the same bytes on all workers.

    Args:
        tensors: by name; every worker passes the same names.
        collectives: of the workers.
        step: steps done, for the error.

    Raises:
        DriftError: on every worker, with the tensor's name and the ranks that differ from most.
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
            f"{name} must be the same on all {len(sums_W)} workers, and after step {step} it "
            f"differs on rank(s) {', '.join(map(str, others))} from what rank "
            f"{sums_W.index(common)} has. A worker's memory or a collective is at fault: check the "
            "nodes of these ranks. Run the same command again to resume from the newest "
            "checkpoint; if that is later than the divergence, remove it first."
        )
