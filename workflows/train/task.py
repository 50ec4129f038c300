"""What the training loop asks of a model: its trained modules, batches, losses, updates, pictures
and final files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.order import Order

if TYPE_CHECKING:
    from smalti.schema import Train

Batch = dict[str, Any]
Metrics = Mapping[str, Tensor | float | tuple[Tensor, Tensor]]
"""Numbers for the log; (mean, count) where the mean is over a count of its own, such as tokens."""


def seed_of(*parts: int) -> int:
    """A 63-bit seed from several numbers, the same on every machine."""
    return int(
        np.random.SeedSequence([part & (2**64 - 1) for part in parts]).generate_state(1, np.uint64)[
            0
        ]
        >> 1
    )


@dataclass(frozen=True)
class Row:
    """One sample: its number in the run, its place, and what the source read of it (`values`)."""

    index: int
    epoch: int
    shard: str
    row: int
    values: Mapping[str, Any]

    def random(self, seed: int) -> np.random.Generator:
        """A generator that depends on (seed, sample number) alone, never on the worker that reads
        the row.
        """
        return np.random.default_rng((seed, 3, self.index))


class Source(Protocol):
    """Rows on storage.

    `sizes[s]` is the number of rows of shard s; `read` must be safe to call from threads.
    """

    @property
    def sizes(self) -> Sequence[int]: ...

    def read(self, shard: int, row: int) -> tuple[str, Mapping[str, Any]]:
        """(shard's key, what the row holds)."""


@dataclass(frozen=True)
class Context:
    """Where a task runs. `seed` is the recipe's; `train` the settings of this run."""

    device: torch.device
    collectives: Collectives
    seed: int
    train: Train

    def generator(self, step: int) -> torch.Generator:
        """A CPU generator of (seed, step): the same on every worker."""
        return torch.Generator().manual_seed(seed_of(self.seed, 4, step))


class StepReader(Protocol):
    """Hands a task this worker's batches of any step, on its device: for an initialisation from
    data.
    """

    def __call__(self, step: int) -> list[Batch]: ...


class Task:
    """Base of every task; made in each worker from plain settings, then `setup`, then the loop.

    A task with several trained modules (a GAN) names each one: the loop makes an engine of each and
    asks for the losses in that order. Frozen modules stay outside the engines: move them in
    `setup`.

    together: what of the losses sees a micro batch of all workers at once ("the contrastive loss"),
    so that its value depends on how many samples that is; "" where all are sums over samples.
    """

    together = ""

    def source(self) -> Source:
        """Rows to train on."""
        raise NotImplementedError

    def order(self, source: Source) -> Order:
        """The order of the source's rows; called after `setup`."""
        return Order(source.sizes, self.context.seed, self.context.train.data_window)

    def setup(self, context: Context) -> None:
        """Build modules (seeded: every rank alike) and move the frozen ones to `context.device`."""
        self.context = context

    def modules(self) -> dict[str, nn.Module]:
        """Trained modules by name, the main one first."""
        raise NotImplementedError

    def peak_lr(self, name: str) -> float:
        """Peak learning rate of an engine."""
        return self.context.train.lr

    def zero_stage(self, name: str) -> int:
        """ZeRO stage of an engine."""
        return self.context.train.zero_stage

    def make_batch(self, rows: Sequence[Row]) -> Batch:
        """A micro batch on the CPU; called ahead of the step, in a thread of its own."""
        raise NotImplementedError

    def totals(self, batch: Batch) -> Tensor | None:
        """Counts by which the losses of a step are divided, when they are not means over samples
        (tokens, say).

        Summed over micro batches and workers, and given to `loss` as a share: counts of the step
        divided by the number of micro batches in it, so that a loss of `sum / share` averages to
        the global mean.
        """
        return None

    def begin_step(self, step: int, engines: Mapping[str, Any], read: StepReader) -> None:
        """Before the batch of a step; every rank calls it (an initialisation from data, say)."""

    def loss(
        self, name: str, engines: Mapping[str, Any], batch: Batch, step: int, share: Tensor | None
    ) -> tuple[Tensor, Metrics] | None:
        """Loss of one engine on one micro batch, and numbers for the log; None: this engine rests
        in this step.
        """
        raise NotImplementedError

    def after_step(self, step: int, engines: Mapping[str, Any]) -> Metrics:
        """After the optimizer's step (codebook statistics over all ranks); numbers for the log."""
        return {}

    def skipped(self, step: int) -> None:
        """In place of `after_step` when the step was passed over: forget what its forwards
        gathered.
        """

    def amount(self, batch: Batch) -> tuple[str, float] | None:
        """What the throughput of this task is told in beside samples, and how much of it a micro
        batch of this worker holds: ("tokens", 4096.0), say.
        """
        return None

    def flops_per_unit(self) -> float | None:
        """Model FLOPs, forward and backward, of one unit of `amount` (of one sample, where that is
        None), for the share of the devices' peak (MFU); None: not told.
        """
        return None

    def pictures(self, engines: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """HWC uint8 pictures by name.

        Made on rank 0 alone (no collectives of one's own here); under ZeRO-3 on every rank, in
        step: from the same inputs.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs and no engine holds."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """Write the final model under `path` (rank 0 only) from each engine's whole state dict;
        final numbers.
        """
        raise NotImplementedError
