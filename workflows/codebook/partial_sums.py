"""Sums of the vectors of each code, over chunks and ranges of codes.

Axis letters: N vectors, C their width, K codes, U codes that occur. A task sums its chunk; further
tasks add up the chunks, each for a range of codes. Sums are float64 and added in a fixed order: of
the vectors in a chunk, then of the chunks. No process holds the sums of all codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from smalti.tokenizers import kmeans

if TYPE_CHECKING:
    from ray import ObjectRef

RANGE_NUMBERS = 1 << 25  # numbers in a range of codes: 268 MB of sums
MOVED_NUMBERS = 1 << 21  # of a range, yielded at once
FOLD = 64  # parts that a task adds to the sums of a range, at most


def mapped(array: np.ndarray) -> Tensor:
    """A tensor over an array of Ray's object store; do not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class UsedSums:
    """float64 sums of the codes that occur in a chunk, one row per code.

    Memory grows with the number of vectors, not with K.
    """

    def __init__(self, num: int, width: int, vectors: int) -> None:
        self.row_K = torch.full((num,), -1)
        # numpy allocates zeros on the first write; torch allocates them at once
        zeros = np.zeros((min(num, vectors), width))
        self.sums = torch.from_numpy(zeros).to(self.row_K.device)
        self.used = 0

    def add(self, x_NC: Tensor, ids_N: Tensor) -> None:
        """Add vectors to the sums of their codes."""
        fresh = ids_N.unique()
        fresh = fresh[self.row_K[fresh] < 0]
        self.row_K[fresh] = torch.arange(self.used, self.used + len(fresh))
        self.used += len(fresh)
        kmeans.add_up(self.sums, x_NC, self.row_K[ids_N])

    def num_used(self, low: int, high: int) -> int:
        """How many of the codes low … high − 1 occur."""
        return int((self.row_K[low:high] >= 0).sum())

    def part(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes low … high − 1 that occur, and their sums.

        Returns:
            Codes counted from `low`, int64 (U,), and sums, float64 (U, C).
        """
        used = (self.row_K[low:high] >= 0).nonzero().flatten()
        return used.cpu().numpy(), self.sums[self.row_K[low + used]].cpu().numpy()


class RangeSums:
    """Sums of the vectors of each code, one Ray object per range of codes.

    Tasks add the chunks in order. A range is updated once its waiting parts have as many rows as
    the range (or number `FOLD`), so that rewriting the sums costs no more than reading the parts.
    """

    def __init__(self, num: int, width: int) -> None:
        self.width = width
        self.step = max(1, RANGE_NUMBERS // max(1, width))
        self.bounds = [(low, min(num, low + self.step)) for low in range(0, num, self.step)]
        self.totals: list[ObjectRef | None] = [None] * len(self.bounds)
        self.waiting: list[list[ObjectRef]] = [[] for _ in self.bounds]
        self.rows = [0] * len(self.bounds)

    def add(self, references: Sequence[ObjectRef], used: Sequence[int]) -> None:
        """Add the next chunk's parts, one per range.

        Args:
            references: to (codes counted from the range's first, their sums).
            used: number of codes in each part.
        """
        for place, (reference, rows) in enumerate(zip(references, used, strict=True)):
            if rows:
                self.waiting[place].append(reference)
                self.rows[place] += rows
                if self.rows[place] >= self.step or len(self.waiting[place]) == FOLD:
                    self._fold(place)

    def _fold(self, place: int) -> None:
        import ray

        (low, high), total = self.bounds[place], self.totals[place]
        if total is not None:  # the store holds at most two rounds of parts
            ray.wait([total], fetch_local=False)
        remote = ray.remote(num_cpus=1)(_add_up)
        self.totals[place] = remote.remote(total, high - low, self.width, *self.waiting[place])
        self.waiting[place] = []
        self.rows[place] = 0

    def ranges(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (codes, float64 (codes, C)) of the ranges with vectors, in order."""
        import ray

        for place, waiting in enumerate(self.waiting):
            if waiting:
                self._fold(place)
        step = max(1, MOVED_NUMBERS // max(1, self.width))
        for place, (low, high) in enumerate(self.bounds):
            total = self.totals[place]
            if total is None:
                continue
            sums_KC = mapped(ray.get(total))
            del total
            self.totals[place] = None
            for start in range(low, high, step):
                rows = slice(start, min(high, start + step))
                yield rows, sums_KC[rows.start - low : rows.stop - low]
            del sums_KC


def _add_up(
    total: np.ndarray | None, rows: int, width: int, *parts: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Task of `RangeSums`."""
    sums_KC = np.zeros((rows, width)) if total is None else total.copy()
    for used, sums in parts:
        sums_KC[used] += sums
    return sums_KC
