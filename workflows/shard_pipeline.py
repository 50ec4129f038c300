"""The one Ray Data pipeline of this project: a shard in, a shard on disk out, a receipt back to the driver.

A worker's `read` loads and decodes a shard, its `work` computes and writes the result under a name that follows from
the input's: a retry rewrites one file, and what stands is skipped. Without a GPU one actor call does both; with one,
CPU tasks read, and the actors that hold the GPU only work. Items and receipts are small; no pixel passes the driver.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from smalti import storage
from smalti.errors import DataError, SmaltiError
from smalti.schema import Resources
from smalti.shards import Receipt, list_shards, read_shard, shard_path, shard_rows

Item = TypeVar("Item")
SHARDS_IN_FLIGHT = 2  # an actor finds its next shard waiting


class ShardWorker(Protocol):
    """What runs in an actor. `read` must not need what only `work` needs (the model): it may run in another process."""

    def read(self, item: Any) -> Any:
        """The decoded input of an item."""

    def work(self, loaded: Any) -> Any:
        """Compute, write the output, and return a receipt."""


def run_shards(
    items: Sequence[Item], worker: type, args: tuple[Any, ...], resources: Resources, *, model: bool = True
) -> Iterator[Any]:
    """Each item's receipt, in the order of completion.

    `worker(*args)` is made once an actor. `model=True`: `resources.actors` actors, each with `cpus_per_worker` CPUs and
    `gpus_per_worker` GPUs; False: `resources.readers` actors of one CPU. A SmaltiError of a worker is raised here as it
    was; any other exception fails the run as Ray tells it; a lost actor's shard is done again.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    if not items:
        return
    DataContext.get_current().target_max_block_size = None  # a block is a shard: never split
    rows = [{"item": pickle.dumps(item)} for item in items]
    data: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    gpus = resources.gpus_per_worker if model else 0
    if gpus:
        readers = ActorPoolStrategy(min_size=1, max_size=resources.readers)
        data = data.map(_Read, fn_constructor_args=(worker, args), compute=readers, num_cpus=1)
    size = resources.actors if model else resources.readers
    pool = ActorPoolStrategy(min_size=1, max_size=size, max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT)
    cpus = resources.cpus_per_worker if model else 1
    data = data.map(
        _Work if gpus else _ReadAndWork,
        fn_constructor_args=(worker, args),
        compute=pool,
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in data.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, SmaltiError):
            raise result
        yield result


class _Caught(Generic[Item]):
    """Base of the actors: a SmaltiError becomes the row's result, so that the driver raises it as it was."""

    def __init__(self, worker: type, args: tuple[Any, ...]) -> None:
        self.worker: ShardWorker = worker(*args)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.step(row)
        except SmaltiError as error:
            return {"result": pickle.dumps(error), "loaded": b""}

    def step(self, row: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class _ReadAndWork(_Caught[Any]):
    def step(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": pickle.dumps(self.worker.work(self.worker.read(pickle.loads(row["item"]))))}


class _Read(_Caught[Any]):
    def step(self, row: dict[str, Any]) -> dict[str, Any]:
        loaded = self.worker.read(pickle.loads(row["item"]))
        return {"result": b"", "loaded": pickle.dumps(loaded, protocol=pickle.HIGHEST_PROTOCOL)}


class _Work(_Caught[Any]):
    def step(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["result"]:
            return {"result": row["result"]}
        return {"result": pickle.dumps(self.worker.work(pickle.loads(row["loaded"])))}


def standing(artifact_path: str, key: str) -> Receipt | None:
    """Receipt of a shard that was written before (writes are whole or absent); None when missing, or torn since."""
    path = shard_path(artifact_path, key)
    if not storage.exists(path):
        return None
    try:
        return Receipt(key, shard_rows(artifact_path, key), storage.size_bytes(path))
    except DataError:
        storage.remove(path)
        return None


def standing_for(artifact_path: str, corpus_path: str, key: str) -> Receipt | None:
    """As `standing`, of a shard made of exactly the images of the corpus shard `key`, in their order.

    One of other images (a corpus made again of changed files has the same fingerprint), or without ids that can be read,
    is taken away, so that it is made again. Errors: DataError on the corpus shard.
    """
    receipt = standing(artifact_path, key)
    if receipt is None:
        return None
    wanted = read_shard(corpus_path, key, ["image_id"]).column("image_id").to_pylist()
    try:
        found = read_shard(artifact_path, key, ["image_id"]).column("image_id").unique().to_pylist()
    except DataError:
        found = None
    if found == wanted:
        return receipt
    storage.remove(shard_path(artifact_path, key))
    return None


def refuse_foreign(artifact_path: str, keys: Sequence[str]) -> None:
    """Errors: DataError when shards lie in the artifact that are none of `keys`: the next stage would read them too."""
    foreign = sorted(set(list_shards(artifact_path)) - set(keys))
    if foreign:
        raise DataError(
            f"{artifact_path} holds {len(foreign):,} shards that the corpus has not, the first is "
            f"{shard_path(artifact_path, foreign[0])}. They are of another run: move them away, and run the command again."
        )
