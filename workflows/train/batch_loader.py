"""Micro batches of a worker, made ahead of the step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from smalti.workflows.train.data import Joined, ShardRows
from smalti.workflows.train.order import Order, Samples
from smalti.workflows.train.task import Batch, Row, Source


class BatchLoader:
    """This worker's micro batches, which a thread makes ahead of the step.

    `for step, batches in loader.steps(first, last)` yields the list of micro batches of each step;
    `at(step)` makes those of any step at once. Errors of reading are raised in the loop, at their
    step.

    Args:
        source: rows.
        order: of the rows.
        make_batch: the task's.
        batch_size: samples per step, over all workers.
        micro: samples per micro batch.
        rank: of this worker.
        world_size: number of workers.
        threads: that read rows.
        ahead: steps to make in advance.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        make_batch: Callable[[Sequence[Row]], Batch],
        *,
        batch_size: int,
        micro: int,
        rank: int,
        world_size: int,
        threads: int = 1,
        ahead: int = 2,
    ) -> None:
        self.source = source
        self.order = order
        self.make_batch = make_batch
        self.batch_size = batch_size
        self.micro = micro
        self.rank = rank
        self.world_size = world_size
        self.ahead = ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read") if threads > 1 else None
        self._lock = threading.Lock()

    def at(self, step: int) -> list[Batch]:
        """Micro batches of a step."""
        with self._lock:
            samples = self.order.part(step, self.batch_size, self.rank, self.world_size)
        rows = self._read(samples)
        return [self.make_batch(rows[i : i + self.micro]) for i in range(0, len(rows), self.micro)]

    def steps(self, first: int, last: int) -> Iterator[tuple[int, list[Batch]]]:
        """Steps `first` to `last` (exclusive), in order."""
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(self.ahead)
        stop = threading.Event()

        def fill() -> None:
            for step in range(first, last):
                try:
                    made: list[Batch] | BaseException = self._prefetched(step)
                except BaseException as error:  # raised in the loop
                    made = error
                if not _put(ready, made, stop) or isinstance(made, BaseException):
                    return

        thread = threading.Thread(target=fill, name="batches", daemon=True)
        thread.start()
        try:
            for step in range(first, last):
                made = ready.get()
                if isinstance(made, BaseException):
                    raise made
                yield step, made
        finally:
            stop.set()
            thread.join()

    def _prefetched(self, step: int) -> list[Batch]:
        """Micro batches of a step, with its source prefetching the shards near it."""
        if isinstance(self.source, ShardRows | Joined):
            near = self.order.near(step, self.batch_size, self.rank, self.world_size)
            self.source.prefetch(near)
        return self.at(step)

    def _read(self, samples: Samples) -> list[Row]:
        columns = (samples.index, samples.epoch, samples.shard, samples.row)
        places = list(zip(*(column.tolist() for column in columns), strict=True))

        def read(place: tuple[int, int, int, int]) -> Row:
            index, epoch, shard, row = place
            key, values = self.source.read(shard, row)
            return Row(index, epoch, key, row, values)

        return list(self._pool.map(read, places) if self._pool else map(read, places))


def _put(
    ready: queue.Queue[list[Batch] | BaseException],
    made: list[Batch] | BaseException,
    stop: threading.Event,
) -> bool:
    """Put a step into the queue, waiting for room; False if the loop has stopped."""
    while not stop.is_set():
        try:
            ready.put(made, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False
