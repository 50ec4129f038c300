"""The order of training samples: a pure function of (seed, epoch, step) over shard sizes.

Shards are permuted each epoch, and rows within windows of a few shards, so that memory does not
grow with the number of rows. The global batch of a step does not depend on the number of workers.
Every row occurs exactly once per epoch, and a batch may contain the end of one epoch and the start
of the next.

Legend: S shards, B samples of a global batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

KEPT_WINDOWS = 3
"""A batch is in one window or two consecutive ones; a third saves work between two epochs."""


@dataclass(frozen=True)
class Samples:
    """Where the samples of a batch are: int64 arrays (B,) in the same order.

    Attributes:
        index: number of the sample in the run.
        epoch: its epoch.
        shard: number of its shard.
        row: its place in the shard.
    """

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
class PrefetchWindow:
    """Shards near a step.

    Attributes:
        around: all shards of the step's windows.
        own: those of them that a worker will read.
        next: those that it will read of the next window.
    """

    around: frozenset[int]
    own: tuple[int, ...]
    next: tuple[int, ...]

    def shifted(self, within: range) -> PrefetchWindow:
        """Those in a range of shards, numbered from its start."""

        def shift(shards: Iterable[int]) -> tuple[int, ...]:
            return tuple(shard - within.start for shard in shards if shard in within)

        return PrefetchWindow(frozenset(shift(self.around)), shift(self.own), shift(self.next))


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order of shards, and where each window starts (in samples of that epoch)."""

    shards: np.ndarray
    window_starts: np.ndarray


class Order:
    """Global batches over shards of the given sizes.

    Args:
        sizes: rows of each shard.
        seed: of the permutations.
        window: shards whose rows are shuffled together: the working set of a reader.

    Raises:
        ValueError: the shards have no rows, or the window no shards.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int = 16) -> None:
        self.sizes_S = np.asarray(sizes, dtype=np.int64)
        if self.sizes_S.ndim != 1 or (self.sizes_S < 0).any() or self.sizes_S.sum() == 0:
            raise ValueError(
                f"shard sizes must be counts with at least one row in all, found {list(sizes)[:8]}"
            )
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, found {window}")
        self.seed = seed
        self.window = window
        self.num_rows = int(self.sizes_S.sum())
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def batch(self, step: int, batch_size: int) -> Samples:
        """The global batch of a step: B samples, sorted by epoch and place of the shard.

        Training depends on the set alone. Sorted, each worker's contiguous part reads few shards,
        and the same ones for as long as the window lasts.
        """
        return self.span(step * batch_size, batch_size)

    def span(self, first: int, count: int) -> Samples:
        """Samples `first` to `first + count` (exclusive) of the run, sorted as in `batch`."""
        index_B = np.arange(first, first + count, dtype=np.int64)
        epoch_B, place_B = np.divmod(index_B, self.num_rows)
        shard_B = np.empty_like(index_B)
        row_B = np.empty_like(index_B)
        rank_B = np.empty_like(index_B)
        begin = 0
        while begin < count:
            epoch = int(epoch_B[begin])
            place = int(place_B[begin])
            starts = self._epoch(epoch).window_starts
            window = self._window_at(epoch, place)
            end = min(count, begin + int(starts[window + 1]) - place)
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
        """A worker's share of the global batch of a step.

        Raises:
            ValueError: the batch does not divide evenly.
        """
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} does not divide among {world_size} workers")
        share = batch_size // world_size
        return self.batch(step, batch_size).part(rank * share, (rank + 1) * share)

    def near(self, step: int, batch_size: int, rank: int, world_size: int) -> PrefetchWindow:
        """The shards near a step, and which of them a worker will read."""
        return self._near(step * batch_size, batch_size, rank, world_size)

    def _near(self, first: int, count: int, rank: int, world_size: int) -> PrefetchWindow:
        around: list[int] = []
        own: list[int] = []
        epoch, place = divmod(first, self.num_rows)
        window = self._window_at(epoch, place)
        end = divmod(first + max(1, count) - 1, self.num_rows)
        last = (end[0], self._window_at(*end))
        while (epoch, window) <= last:
            around += self._shards(epoch, window).tolist()
            own += self._share(epoch, window, rank, world_size)
            window += 1
            if window == self._num_windows:
                epoch += 1
                window = 0
        following = self._share(epoch, window, rank, world_size)
        return PrefetchWindow(frozenset(around), tuple(own), tuple(following))

    @property
    def _num_windows(self) -> int:
        return -(-len(self.sizes_S) // self.window)

    def _window_at(self, epoch: int, place: int) -> int:
        return int(np.searchsorted(self._epoch(epoch).window_starts, place, side="right")) - 1

    def _shards(self, epoch: int, window: int) -> np.ndarray:
        """Numbers of the shards of a window."""
        return self._epoch(epoch).shards[window * self.window : (window + 1) * self.window]

    def _share(self, epoch: int, window: int, rank: int, world_size: int) -> list[int]:
        """Shards of a window that contain a worker's parts of its batches, apart from chance."""
        shards = self._shards(epoch, window)
        ends = np.cumsum(self.sizes_S[shards])
        low = rank * ends[-1] / world_size
        high = (rank + 1) * ends[-1] / world_size
        return shards[(ends > low) & (ends - self.sizes_S[shards] < high)].tolist()

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
            shards = self._shards(epoch, window)
            bounds = np.concatenate([[0], np.cumsum(self.sizes_S[shards])])
            order = np.random.default_rng((self.seed, 2, epoch, window)).permutation(
                int(bounds[-1])
            )
            self._windows[key] = (order, bounds[:-1])
            while len(self._windows) > KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]


class Mixed(Order):
    """Samples of two orders, mixed by a share that may change during the run.

    Rows and texts have epochs of their own, and each occurs exactly once per epoch. Shards of
    `texts` are numbered after those of `rows`.

    Args:
        rows: order of the rows.
        texts: order of the texts.
        starts: numbers of samples, ascending from 0.
        shares: from sample `starts[k]` of the run on, `shares[k]` (below 1) of them are texts.
    """

    def __init__(
        self, rows: Order, texts: Order, starts: Sequence[int], shares: Sequence[float]
    ) -> None:
        self.rows = rows
        self.texts = texts
        self.starts_K = np.asarray(starts, np.int64)
        self.shares_K = np.asarray(shares, np.float64)
        lengths = np.diff(self.starts_K)
        self.before_K = np.concatenate([[0.0], np.cumsum(lengths * self.shares_K[:-1])])

    def texts_before(self, index_N: np.ndarray) -> np.ndarray:
        """Number of texts before each of these samples of the run: int64 (N,)."""
        k = np.searchsorted(self.starts_K, index_N, side="right") - 1
        return np.floor(self.before_K[k] + self.shares_K[k] * (index_N - self.starts_K[k])).astype(
            np.int64
        )

    def batch(self, step: int, batch_size: int) -> Samples:
        """The global batch of a step: rows as in `Order.batch`, texts spread evenly among them."""
        first = step * batch_size
        before = self.texts_before(np.arange(first, first + batch_size + 1))
        num = int(before[-1] - before[0])
        rows = self.rows.span(first - int(before[0]), batch_size - num)
        texts = self.texts.span(int(before[0]), num)
        is_text_B = np.diff(before) > 0
        even = np.arange(batch_size + 1) * num // batch_size
        # The places of texts come first.
        order = np.argsort(np.argsort(np.diff(even) == 0, kind="stable"), kind="stable")
        index_B = np.arange(first, first + batch_size)
        index = [
            index_B[is_text_B][texts.index - before[0]],
            index_B[~is_text_B][rows.index - (first - before[0])],
        ]
        pairs = (
            index,
            (texts.epoch, rows.epoch),
            (texts.shard + len(self.rows.sizes_S), rows.shard),
            (texts.row, rows.row),
        )
        return Samples(*(np.concatenate(pair)[order] for pair in pairs))

    def near(self, step: int, batch_size: int, rank: int, world_size: int) -> PrefetchWindow:
        first = step * batch_size
        before, after = self.texts_before(np.asarray([first, first + batch_size])).tolist()
        rows = self.rows._near(first - before, batch_size - (after - before), rank, world_size)
        texts = self.texts._near(before, after - before, rank, world_size)
        shift = len(self.rows.sizes_S)
        return PrefetchWindow(
            rows.around | {shard + shift for shard in texts.around},
            rows.own + tuple(shard + shift for shard in texts.own),
            rows.next + tuple(shard + shift for shard in texts.next),
        )
