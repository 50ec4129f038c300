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
    """This worker's micro batches, step after step, made by a thread ahead of the step.

    `for step, batches in feed.steps(first, last)` gives a list of micro batches a step; `at(step)`
    makes those of any step at once. An error while reading is raised to the loop, in its step.
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
        self.source, self.order, self.make_batch = source, order, make_batch
        self.batch_size, self.micro, self.rank, self.world_size = (
            batch_size,
            micro,
            rank,
            world_size,
        )
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
        ready: queue.Queue[tuple[int, list[Batch] | BaseException]] = queue.Queue(self.ahead)
        stop = threading.Event()

        def fill() -> None:
            for step in range(first, last):
                try:
                    if isinstance(self.source, ShardRows | Joined):
                        self.source.prefetch(
                            self.order.near(step, self.batch_size, self.rank, self.world_size)
                        )
                    made: list[Batch] | BaseException = self.at(step)
                except BaseException as error:  # handed to the loop, which raises it
                    made = error
                while not stop.is_set():
                    try:
                        ready.put((step, made), timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stop.is_set() or isinstance(made, BaseException):
                    return

        thread = threading.Thread(target=fill, name="feed", daemon=True)
        thread.start()
        try:
            for _ in range(first, last):
                step, made = ready.get()
                if isinstance(made, BaseException):
                    raise made
                yield step, made
        finally:
            stop.set()
            thread.join()

    def _read(self, samples: Samples) -> list[Row]:
        places = list(
            zip(
                *(a.tolist() for a in (samples.index, samples.epoch, samples.shard, samples.row)),
                strict=True,
            )
        )

        def read(place: tuple[int, int, int, int]) -> Row:
            index, epoch, shard, row = place
            key, values = self.source.read(shard, row)
            return Row(index, epoch, key, row, values)

        return list(self._pool.map(read, places) if self._pool else map(read, places))
