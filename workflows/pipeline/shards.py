"""The Ray Data pipeline that all shard stages share.

A shard goes in, a shard on disk comes out, and a receipt returns to the driver. A worker's `read`
loads and decodes a shard, its `work` computes and writes the result under a name derived from the
input's: a retry rewrites one file, and finished shards are skipped. Without a GPU one actor call
does both. With one, CPU actors read and the GPU actors only work, as long as a decoded shard is
small enough for the object store (`BLOCK_BYTES`). Items and receipts are small; no pixels pass
through the driver.

A block of Ray Data is one row: the pickle of (kind, value, noted), and in a second column the
value's first large array, which is thus passed between actors without a copy into the pickle.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa

from smalti.errors import DataError, SmaltiError
from smalti.progress import log
from smalti.schema import Resources
from smalti.workflows.cluster.session import want_gpus
from smalti.workflows.pipeline.timings import PROCESS_TALLY, Tally

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy, Dataset
    from ray.data.dataset import MaterializedDataset

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
SHARDS_IN_FLIGHT = 2  # the next shard of an actor is loaded meanwhile
BLOCK_BYTES = (
    600_000_000  # 1,000 images of 384 px are 442 MB; three of each actor lie in the object store
)


class ShardWorker(Protocol[Item_contra, Loaded, Result_co]):
    """Code that runs in an actor.

    `read` must not need what only `work` needs (the model): it may run in another process.
    """

    def read(self, item: Item_contra, /) -> Loaded:
        """The decoded input of an item."""

    def work(self, loaded: Loaded, /) -> Result_co:
        """Compute, write the output, and return a receipt."""


def run_shards(
    items: Sequence[Item],
    worker: Callable[..., ShardWorker[Item, Loaded, Result]],
    args: tuple[object, ...],
    resources: Resources,
    *,
    model: bool = True,
    tally: Tally | None = None,
    block_bytes: int = 0,
) -> Iterator[Result]:
    """Yield each item's receipt, in the order of completion.

    A lost actor's shard is retried.

    Args:
        worker: created as `worker(*args)`, once per actor.
        model: whether to use `resources.actors` actors with `cpus_per_worker` CPUs and
            `gpus_per_worker` GPUs each;
            otherwise `resources.readers` actors with one CPU each.
        tally: receives what the workers counted, before the receipt is yielded.
        block_bytes: size of a loaded item; above `BLOCK_BYTES` the GPU actors read for themselves.

    Raises:
        SmaltiError: of a worker, unchanged. Another exception fails the run with the error that
            Ray reports.
        DataError: naming an item whose workers died `DEATHS` times.
    """
    if not items:
        return
    run = f"smalti/{uuid.uuid4().hex}"
    data = _pipeline(_blocks(run, items), worker, args, resources, model, block_bytes)
    batches = iter(data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    assert isinstance(batches, Generator)
    try:
        for table in batches:
            _, result, noted = _unpack(table)
            if tally is not None:
                tally.add(noted)
            if isinstance(result, SmaltiError):
                raise result
            yield result
    finally:
        batches.close()  # also ends the actors of an abandoned iteration: none may write later
        _forget(run)


def _blocks(run: str, items: Sequence[object]) -> MaterializedDataset:
    """A dataset of one row per item, each with its ticket."""
    import ray.data
    from ray.data import DataContext

    DataContext.get_current().target_max_block_size = None  # a block is a shard: never split
    tickets = [
        Ticket(f"{run}/{number}", repr(item)[:NAME_LENGTH], DEATHS)
        for number, item in enumerate(items)
    ]
    rows = [
        {"head": pickle.dumps((ITEM, (ticket, item), {})), "array": b""}
        for ticket, item in zip(tickets, items, strict=True)
    ]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _pipeline(
    blocks: MaterializedDataset,
    worker: Callable[..., ShardWorker[Item, Loaded, Result]],
    args: tuple[object, ...],
    resources: Resources,
    model: bool,
    block_bytes: int,
) -> Dataset:
    """The dataset of results: one pool of actors, or readers before GPU actors."""
    from ray.data import ActorPoolStrategy

    def map_blocks(
        data: Dataset, step: type[_Caught], pool: ActorPoolStrategy, cpus: float, gpus: float
    ) -> Dataset:
        return data.map_batches(
            step,
            batch_size=1,
            batch_format="pyarrow",
            compute=pool,
            fn_constructor_args=(worker, args),
            num_cpus=cpus,
            num_gpus=gpus,
        )

    gpus = resources.gpus_per_worker if model else 0
    want_gpus(gpus)
    apart = gpus > 0 and block_bytes <= BLOCK_BYTES
    if gpus and not apart:
        log(
            f"a decoded shard is {block_bytes / 1e6:,.0f} MB, more than {BLOCK_BYTES / 1e6:,.0f} "
            "MB: the GPU actors decode themselves. Lower corpus.shard_images to let separate "
            "readers decode ahead of them"
        )
    data: Dataset = blocks
    if apart:
        readers = ActorPoolStrategy(
            min_size=1, max_size=resources.readers, initial_size=resources.readers
        )
        data = map_blocks(blocks, _Read, readers, 1, 0)
    size = min(resources.actors if model else resources.readers, blocks.num_blocks())
    pool = ActorPoolStrategy(
        min_size=1, max_size=size, initial_size=size, max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT
    )
    cpus = resources.cpus_per_worker if model else 1
    return map_blocks(data, _Work if apart else _ReadAndWork, pool, cpus, gpus)


class Ticket(NamedTuple):
    """An item's identity in the pipeline.

    Attributes:
        key: in Ray's internal store, where attempts are counted.
        item: its description in errors.
        deaths: how many of its workers may die.
    """

    key: str
    item: str
    deaths: int


@contextmanager
def _begun(ticket: Ticket, step: str) -> Iterator[None]:
    """Count an attempt in Ray's internal store until the item is finished.

    Raises:
        DataError: if as many attempts were counted as workers may die.
    """
    from ray.experimental import internal_kv

    key = f"{ticket.key}/{step}".encode()
    before = int(internal_kv._internal_kv_get(key) or 0)
    if before >= ticket.deaths:
        raise DataError(
            f"{before} workers died on {ticket.item}: they crashed or ran out of memory. To save "
            "memory, lower resources.actors, resources.readers or corpus.shard_images; remove a "
            "file that crashes its reader from the source. Then run the same command to resume: "
            "finished shards are kept."
        )
    internal_kv._internal_kv_put(key, str(before + 1).encode())
    yield
    internal_kv._internal_kv_del(key)


def _forget(run: str) -> None:
    """Remove the attempt counts of a run, if Ray is still running."""
    import ray
    from ray.experimental import internal_kv

    if ray.is_initialized():
        internal_kv._internal_kv_del(run.encode(), del_by_prefix=True)


ITEM, LOADED, RESULT = "item", "loaded", "result"
DEATHS = 5  # of workers per item before it fails; some may be lost with their nodes
NAME_LENGTH = 300
LARGE_BYTES = 2**20  # from this size on an array is not copied into the pickle


def _pack(kind: str, value: object, noted: dict[str, float]) -> pa.Table:
    """A block of Ray Data: the pickle, and its first large array."""
    large: list[pa.Buffer] = []

    def stays(found: pickle.PickleBuffer) -> bool:
        data = found.raw()
        if large or data.nbytes < LARGE_BYTES:
            return True
        large.append(pa.py_buffer(data))
        return False

    head = pickle.dumps((kind, value, noted), protocol=5, buffer_callback=stays)
    array = large[0] if large else pa.py_buffer(b"")
    ends = pa.array([0, array.size], pa.int64()).buffers()[1]
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, array])
    return pa.table({"head": pa.array([head], pa.large_binary()), "array": column})


def _unpack(table: pa.Table) -> tuple[str, Any, dict[str, float]]:
    """(kind, value, noted) of a block; its large array is a read-only view."""
    views = []
    for name in ("head", "array"):
        array = table.column(name).chunk(0).cast(pa.large_binary())  # no copy where it is one
        _, ends, data = array.buffers()
        start, end = memoryview(ends).cast("B").cast("q")[array.offset : array.offset + 2]
        views.append(data.slice(start, end - start) if data is not None else pa.py_buffer(b""))
    kind, value, noted = pickle.loads(views[0], buffers=views[1:])
    return kind, value, noted


class _Caught:
    """Base of the actors: returns a SmaltiError as the result, for the driver to raise."""

    gives = RESULT

    def __init__(
        self, worker: Callable[..., ShardWorker[object, object, object]], args: tuple[object, ...]
    ) -> None:
        import ray

        self.worker = worker(*args)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            PROCESS_TALLY.count("restarts")

    def __call__(self, block: pa.Table) -> pa.Table:
        kind, value, noted = _unpack(block)
        if kind == RESULT:  # a reader's error
            return block
        PROCESS_TALLY.add(noted)
        ticket, value = value
        try:
            with _begun(ticket, type(self).__name__):
                result = self.step(value)
        except SmaltiError as error:
            return _pack(RESULT, error, PROCESS_TALLY.drain())
        return _pack(
            self.gives, result if self.gives == RESULT else (ticket, result), PROCESS_TALLY.drain()
        )

    def step(self, value: object) -> object:
        raise NotImplementedError


class _ReadAndWork(_Caught):
    def step(self, value: object) -> object:
        return self.worker.work(self.worker.read(value))


class _Read(_Caught):
    gives = LOADED

    def step(self, value: object) -> object:
        return self.worker.read(value)


class _Work(_Caught):
    def step(self, value: object) -> object:
        return self.worker.work(value)
