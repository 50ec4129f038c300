"""What the training loop needs of a model.

Its trained modules, batches, losses, updates, pictures and final files.
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
    from smalti.workflows.train.deepspeed_compat import Engine

Values = Mapping[str, Any]
"""What a source reads of a row, by column; the task knows the types."""
Batch = dict[str, Any]
"""A micro batch: tensors by name, and lists of what is no number."""
Metrics = Mapping[str, Tensor | float | tuple[Tensor, Tensor]]
"""Numbers for the log; (mean, count) where the mean is over a count of its own, such as tokens."""


def seed_of(*parts: int) -> int:
    """A 63-bit seed from several numbers, the same on every node."""
    sequence = np.random.SeedSequence([part & (2**64 - 1) for part in parts])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Row:
    """One sample.

    Attributes:
        index: its number in the run.
        epoch: number of the epoch.
        shard: key of its shard.
        row: its place in the shard.
        values: what the source read.
    """

    index: int
    epoch: int
    shard: str
    row: int
    values: Values

    def random(self, seed: int) -> np.random.Generator:
        """A generator that depends on (seed, sample number) alone, not on the worker."""
        return np.random.default_rng((seed, 3, self.index))


class Source(Protocol):
    """Rows in storage.

    `sizes[s]` is the number of rows of shard s; `read` must be safe to call from threads.
    """

    @property
    def sizes(self) -> Sequence[int]: ...

    def read(self, shard: int, row: int) -> tuple[str, Values]:
        """The key of a shard, and the content of one of its rows."""


@dataclass(frozen=True)
class Context:
    """Where a task runs.

    Attributes:
        device: of this worker.
        collectives: of all workers.
        seed: the recipe's.
        train: the settings of this run.
    """

    device: torch.device
    collectives: Collectives
    seed: int
    train: Train

    def generator(self, step: int) -> torch.Generator:
        """A CPU generator of (seed, step): the same on every worker."""
        return torch.Generator().manual_seed(seed_of(self.seed, 4, step))


class StepReader(Protocol):
    """Reads this worker's batches of any step, on its device: for an initialisation from data."""

    def __call__(self, step: int) -> list[Batch]: ...


class Task:
    """Base of every task: created in each worker from plain settings, then `setup`, then the loop.

    A task with several trained modules (a GAN) names each one: the loop creates an engine per
    module and computes the losses in that order. Frozen modules stay outside the engines: move them
    to the device in `setup`.

    Attributes:
        together: what of the losses sees a micro batch of all workers at once ("the contrastive
            loss"), so that its value depends on the number of samples in it; "" where all losses
            are sums over samples.
    """

    together = ""

    def source(self) -> Source:
        """Rows to train on."""
        raise NotImplementedError

    def order(self, source: Source) -> Order:
        """The order of the source's rows; called after `setup`."""
        return Order(source.sizes, self.context.seed, self.context.train.data_window)

    def setup(self, context: Context) -> None:
        """Build the modules, and move the frozen ones to `context.device`.

        Every rank draws the same weights, from the seed.
        """
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

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Modules outside the engines that `loss` uses, by name."""
        return {}

    def make_batch(self, rows: Sequence[Row]) -> Batch:
        """A micro batch on the CPU.

        Called ahead of the step, in a thread of its own.
        """
        raise NotImplementedError

    def planned_batch(self, num: int) -> Batch:
        """A micro batch of `num` samples as the planner traces it.

        Shapes and dtypes are those of `make_batch`, sequences are as long as they can be; the
        values mean nothing.
        """
        raise NotImplementedError

    def totals(self, batch: Batch) -> Tensor | None:
        """Counts that divide the losses of a step, where they are not means over samples (tokens).

        They are summed over micro batches and workers, divided by the number of micro batches in
        the step, and passed to `loss` as `share`: a loss of `sum / share` averages to the global
        mean.
        """
        return None

    def begin_step(self, step: int, engines: Mapping[str, Engine], read: StepReader) -> None:
        """Called before the batch of a step, on every rank: for an initialisation from data."""

    def loss(
        self,
        name: str,
        engines: Mapping[str, Engine],
        batch: Batch,
        step: int,
        share: Tensor | None,
    ) -> tuple[Tensor, Metrics] | None:
        """Loss of one engine on one micro batch, and numbers for the log.

        None: this engine is not trained in this step.
        """
        raise NotImplementedError

    def after_step(self, step: int, engines: Mapping[str, Engine]) -> Metrics:
        """Called after the optimizer's step (codebook statistics over all ranks).

        Returns:
            Numbers for the log.
        """
        return {}

    def skipped(self, step: int) -> None:
        """Called instead of `after_step` when a step is skipped.

        Discard what the step's forward passes gathered.
        """

    def amount(self, batch: Batch) -> tuple[str, float] | None:
        """Unit of the throughput beside samples, and its count in a micro batch of this worker.

        For example ("tokens", 4096.0); None: samples alone.
        """
        return None

    def flops_per_unit(self) -> float | None:
        """Model FLOPs, forward and backward, per unit of `amount`, or per sample without a unit.

        They give the share of the devices' peak (MFU). None: it is not reported.
        """
        return None

    def pictures(self, engines: Mapping[str, Engine]) -> dict[str, np.ndarray]:
        """HWC uint8 pictures by name.

        Rank 0 alone makes them, so call no collectives here. Under ZeRO-3 every rank makes them at
        the same time, from the same inputs.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the engines' states."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """Write the final model; rank 0 only.

        Args:
            path: folder of the model.
            weights: whole state dict of each engine.

        Returns:
            Final numbers.
        """
        raise NotImplementedError
