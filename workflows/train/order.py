"""The order of training samples: a pure function of (seed, epoch, step) over shard sizes.

Shards are permuted each epoch, rows within windows of a few shards, so that memory does not grow with the number of
rows. The global batch of a step does not depend on the number of workers; every row comes exactly once an epoch, and
batches run across the border of two epochs.

Legend: S shards, B samples of a global batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEPT_WINDOWS = 3  # a batch lies in one window or two neighbours; one more spares work at the border of epochs


@dataclass(frozen=True)
class Samples:
    """Where the samples of a batch lie: int64 arrays (B,) of the same order; `index` numbers samples over the run."""

    index: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def part(self, start: int, stop: int) -> Samples:
        """Samples start to stop (exclusive)."""
        window = slice(start, stop)
        return Samples(self.index[window], self.epoch[window], self.shard[window], self.row[window])


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order of shards and where each window begins (in samples of that epoch)."""

    shards: np.ndarray
    window_starts: np.ndarray


class Order:
    """Global batches over shards of the given sizes.

    `window` shards are shuffled together: the working set of a reader. `ValueError` for sizes that hold no row.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int = 16) -> None:
        self.sizes_S = np.asarray(sizes, dtype=np.int64)
        if self.sizes_S.ndim != 1 or (self.sizes_S < 0).any() or self.sizes_S.sum() == 0:
            raise ValueError(f"shard sizes must be counts with at least one row in all, found {list(sizes)[:8]}")
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, found {window}")
        self.seed = seed
        self.window = window
        self.num_rows = int(self.sizes_S.sum())
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def batch(self, step: int, batch_size: int) -> Samples:
        """The global batch of a step: B samples, sorted by epoch and place of the shard in its window.

        The set is what matters to training; the sorting lets each worker's contiguous part touch few shards: it
        stays at the same shards of a window for as long as the window lasts.
        """
        index_B = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
        epoch_B, place_B = index_B // self.num_rows, index_B % self.num_rows
        shard_B, row_B, rank_B = np.empty_like(index_B), np.empty_like(index_B), np.empty_like(index_B)
        begin = 0
        while begin < batch_size:
            epoch, place = int(epoch_B[begin]), int(place_B[begin])
            starts = self._epoch(epoch).window_starts
            window = int(np.searchsorted(starts, place, side="right")) - 1
            end = min(batch_size, begin + int(starts[window + 1]) - place)
            order_R, offsets = self._window(epoch, window)
            picked = order_R[place - starts[window] : place - starts[window] + end - begin]
            nth = np.searchsorted(offsets, picked, side="right") - 1
            shard_B[begin:end] = self._epoch(epoch).shards[window * self.window + nth]
            row_B[begin:end] = picked - offsets[nth]
            rank_B[begin:end] = nth + window * self.window
            begin = end
        order = np.lexsort((index_B, rank_B, epoch_B))
        return Samples(index_B[order], epoch_B[order], shard_B[order], row_B[order])

    def part(self, step: int, batch_size: int, rank: int, world_size: int) -> Samples:
        """Worker `rank`'s share of a step's global batch; `ValueError` unless the batch divides evenly."""
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} does not divide among {world_size} workers")
        share = batch_size // world_size
        return self.batch(step, batch_size).part(rank * share, (rank + 1) * share)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.sizes_S))
            heads = np.arange(0, len(shards), self.window)
            totals = np.add.reduceat(self.sizes_S[shards], heads)
            self._epochs[epoch] = _Epoch(shards, np.concatenate([[0], np.cumsum(totals)]))
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted rows of one window, and the first row of each of its shards."""
        key = (epoch, window)
        if key not in self._windows:
            shards = self._epoch(epoch).shards[window * self.window : (window + 1) * self.window]
            bounds = np.concatenate([[0], np.cumsum(self.sizes_S[shards])])
            order = np.random.default_rng((self.seed, 2, epoch, window)).permutation(int(bounds[-1]))
            self._windows[key] = (order, bounds[:-1])
            while len(self._windows) > KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]
