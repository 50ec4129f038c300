"""Sums of the vectors of each code: of a chunk in its task, of all chunks in tasks that own a range of codes each.

Axis letters: N vectors, C their width, K codes, U codes that occur. Sums are float64 and added in a fixed order: of the
vectors in a chunk, then of the chunks. No process holds the sums of all codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalti.tokenizers import kmeans

RANGE_NUMBERS = 1 << 25  # numbers in a range of codes: 268 MB of sums
FOLD = 8  # chunks that a task adds to the sums of a range


class UsedSums:
    """Sums of the vectors of the codes that occur, float64: a row a code that was seen, so memory follows the vectors."""

    def __init__(self, num: int, width: int, vectors: int) -> None:
        self.row_K = torch.full((num,), -1)
        self.sums = torch.zeros(min(num, vectors), width, dtype=torch.float64)
        self.used = 0

    def add(self, x_NC: Tensor, ids_N: Tensor) -> None:
        """Add vectors to the sums of their codes."""
        fresh = ids_N.unique()
        fresh = fresh[self.row_K[fresh] < 0]
        self.row_K[fresh] = torch.arange(self.used, self.used + len(fresh))
        self.used += len(fresh)
        kmeans.add_up(self.sums, x_NC, self.row_K[ids_N])

    def part(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the codes low … high − 1 those that occur, counted from `low`, and their sums: int64 (U,), float64 (U, C)."""
        used = (self.row_K[low:high] >= 0).nonzero().flatten()
        return used.cpu().numpy(), self.sums[self.row_K[low + used]].cpu().numpy()


class RangeSums:
    """Sums of the vectors of each code, a range of codes an object: added in the order of the chunks, by tasks."""

    def __init__(self, num: int, width: int) -> None:
        self.width, step = width, max(1, RANGE_NUMBERS // max(1, width))
        self.bounds = [(low, min(num, low + step)) for low in range(0, num, step)]
        self.totals: list[Any] = [None] * len(self.bounds)
        self.waiting: list[Sequence[Any]] = []

    def add(self, references: Sequence[Any]) -> None:
        """The next chunk's parts, one a range: (codes counted from the range's first, their sums)."""
        self.waiting.append(references)
        if len(self.waiting) == FOLD:
            self._fold()

    def _fold(self) -> None:
        import ray

        before = [total for total in self.totals if total is not None]
        if before:  # no more than two rounds of parts are held by the store
            ray.wait(before, num_returns=len(before))
        remote = ray.remote(num_cpus=1)(_add_up)
        self.totals = [
            remote.remote(total, high - low, self.width, *(parts[place] for parts in self.waiting))
            for place, ((low, high), total) in enumerate(zip(self.bounds, self.totals, strict=True))
        ]
        self.waiting = []

    def ranges(self) -> Iterator[tuple[slice, Tensor]]:
        """(codes, float64 (codes, C)) of each range that a chunk added to, one at a time."""
        import ray

        if self.waiting:
            self._fold()
        for (low, high), total in zip(self.bounds, self.totals, strict=True):
            if total is not None:
                yield slice(low, high), torch.tensor(ray.get(total))


def _add_up(total: np.ndarray | None, rows: int, width: int, *parts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Task of `RangeSums`."""
    sums_KC = np.zeros((rows, width)) if total is None else total.copy()
    for used, sums in parts:
        sums_KC[used] += sums
    return sums_KC
