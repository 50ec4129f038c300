"""Means of the numbers that a training logs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.task import Metrics


class MetricMeans:
    """Means of named numbers over micro batches, steps and workers.

    They are kept on the device until they are read. A number may be (mean, count): then means are
    weighted by their counts, and one with a total count of 0 is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: Metrics, parts: int = 1) -> None:
        """Add numbers; scalar tensors stay on their device.

        Args:
            metrics: numbers by name.
            parts: how often a step has such numbers, over all workers, so that every step has the
                same weight even if the number of workers changes during the run.
        """
        for name, value in metrics.items():
            mean, weight = value if isinstance(value, tuple) else (value, 1.0 / parts)
            weight = torch.as_tensor(weight, device=self.device, dtype=torch.float64).detach()
            mean = torch.as_tensor(mean, device=self.device, dtype=torch.float64).detach()
            pair = torch.stack([mean * weight, weight])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self, collectives: Collectives) -> dict[str, float]:
        """Means over all workers since the last call; all must have added the same names."""
        if not self.sums:
            return {}
        totals = self.totals(collectives)
        self.sums = {}
        return {name: total / weight for name, (total, weight) in totals.items() if weight}

    def totals(self, collectives: Collectives) -> dict[str, list[float]]:
        """[sum, weight] of each name over all workers since the last `take`.

        A checkpoint between two logs keeps them.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = collectives.all_reduce(torch.stack([self.sums[name] for name in names])).tolist()
        return dict(zip(names, totals, strict=True))

    def restore(self, totals: Mapping[str, list[float]], rank: int) -> None:
        """Continue from the `totals` of a checkpoint; the first worker holds them for all."""
        for name, pair in totals.items():
            kept = torch.tensor(pair, dtype=torch.float64, device=self.device)
            self.sums[name] = kept if rank == 0 else torch.zeros_like(kept)
