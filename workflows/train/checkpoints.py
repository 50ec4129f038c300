"""Checkpoints of a training run: writing, sending to storage, choosing one, and loading it.

A checkpoint is one folder per step: the engines' states, the task's state, and where the loop was.
Each worker writes its files to its own disk and trains on while a thread sends them to storage,
with a manifest last of all (see `manifests`). Incomplete checkpoints are skipped, and so are those
with a file whose checksum has changed since it was written.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NotRequired, TypedDict

import torch

from smalti import storage
from smalti.errors import ConfigError, DataError
from smalti.workflows.pipeline.retry import retry_storage
from smalti.workflows.train import reshard
from smalti.workflows.train.checkpoint_policy import CheckpointPolicy
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.deepspeed_compat import Engine
from smalti.workflows.train.manifests import (
    CompleteCheckpoint,
    Manifest,
    checksum,
    inspect_checkpoint,
    manifest_name,
    newest_complete,
    step_folder,
    step_folders,
)
from smalti.workflows.train.scratch import Scratch, disk_is_full, shared_folder
from smalti.workflows.train.task import Task

STATE_FILE = "loop.json"
TASK_FILE = "task.pt"
TAG = "engine"


class LoopState(TypedDict):
    """Where the loop is: steps done, and what it has counted and logged so far."""

    step: int
    history: list[dict[str, float]]
    skips: NotRequired[dict[str, int]]
    meter: NotRequired[dict[str, list[float]]]
    at_once: NotRequired[int]


class SavedState(LoopState):
    """The loop's state in a checkpoint, with what the engines' files depend on."""

    world_size: int
    zero_stages: dict[str, int]


class Checkpoints:
    """The checkpoints of a run, as one of its workers sees them.

    All workers call `save`, `wait` and `load` in the same order.
    """

    def __init__(
        self,
        folder: str,
        collectives: Collectives,
        policy: CheckpointPolicy,
        *,
        say: Callable[[str], None] = lambda line: None,
        say_own: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            folder: where the checkpoints of this run are.
            collectives: of the workers.
            policy: which checkpoints are kept.
            say: gets lines that are the same on every worker.
            say_own: gets lines about this worker's own files.
        """
        self.folder = folder
        self.collectives = collectives
        self.policy = policy
        self.say = say
        self.say_own = say_own
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sending: Future[None] | None = None

    def save(self, engines: Mapping[str, Engine], task: Task, state: LoopState) -> None:
        """Write a checkpoint of all that a resumed run needs.

        Returns when it is on this worker's disk; the next `save` or `wait` raises errors of sending
        it.
        """
        self.wait()
        self.collectives.storage_barrier()  # the one before was sent
        score = self.policy.score(state["history"])
        target = storage.join(self.folder, step_folder(state["step"]))
        with _local_folder() as scratch:
            for name, engine in engines.items():
                engine.save_checkpoint(os.path.join(scratch.path, name), tag=TAG)
            if self.collectives.rank == 0:
                self._write_shared(engines, task, state, scratch.path)
                # an incomplete checkpoint of an earlier try
                retry_storage(storage.remove, target, say=self.say_own)
            self.collectives.storage_barrier()
        self._sending = self._thread.submit(self._send, scratch, target, score)

    def _write_shared(
        self, engines: Mapping[str, Engine], task: Task, state: LoopState, folder: str
    ) -> None:
        """Write what rank 0 writes for all workers: the states of the task and of the loop."""
        torch.save(task.state_dict(), os.path.join(folder, TASK_FILE))
        saved = SavedState(
            **state, world_size=self.collectives.world_size, zero_stages=zero_stages(engines)
        )
        with open(os.path.join(folder, STATE_FILE), "w") as out:
            json.dump(saved, out)

    def wait(self) -> None:
        """Return when this worker's files of the last checkpoint are in storage.

        Raises:
            Exception: what failed while they were sent.
        """
        if self._sending is not None:
            sending = self._sending
            self._sending = None
            sending.result()

    def load(self, engines: Mapping[str, Engine], task: Task) -> SavedState | None:
        """Load the newest complete checkpoint.

        ZeRO's optimizer states, which are partitioned by worker, are partitioned again when another
        number of workers wrote them.

        Returns:
            The loop's state; None without a checkpoint.

        Raises:
            ConfigError: it was written with other ZeRO stages.
            TrainingError: it lacks an engine, or the state of one does not fit.
        """
        device = next(iter(engines.values())).device
        damaged: list[str] = []
        while (chosen := self._choose(device, damaged)) is not None:
            with fetched(chosen, self.collectives, self.say_own) as folder:
                wrong = self._damaged_file(chosen, folder, device)
                if not wrong:
                    return self._load_from(folder, chosen.path, engines, task)
            self.say(
                f"skipping the checkpoint {chosen.path}: {wrong} is damaged (its checksum is not "
                "the one it was written with)"
            )
            damaged.append(chosen.path)
        return None

    def _load_from(
        self, folder: str, path: str, engines: Mapping[str, Engine], task: Task
    ) -> SavedState:
        """Load the local `folder` of the checkpoint `path`."""
        state: SavedState = storage.read_json(os.path.join(folder, STATE_FILE))
        check_stages(state, engines, path)
        reshards = state["world_size"] != self.collectives.world_size
        for name, engine in engines.items():
            source = os.path.join(folder, name)
            shown = f"{path}/{name}"
            if reshards and engine.zero_optimization_stage():
                reshard.load(engine, source, TAG, self.collectives, shown=shown)
            else:
                reshard.load_engine(engine, source, TAG, shown=shown)
        device = next(iter(engines.values())).device
        task.load_state_dict(
            torch.load(os.path.join(folder, TASK_FILE), map_location=device, weights_only=True)
        )
        self.collectives.storage_barrier()
        return state

    def _damaged_file(self, chosen: CompleteCheckpoint, folder: str, device: torch.device) -> str:
        """Name of a damaged file, the same on every worker; "" without one.

        Each worker checks its share of the files.
        """
        ranks = range(self.collectives.rank, len(chosen.files), self.collectives.world_size)
        own = [name for rank in ranks for name in chosen.files[rank] if name in chosen.checksums]
        wrong = [
            name for name in own if checksum(os.path.join(folder, name)) != chosen.checksums[name]
        ]
        lines = "".join(f"{name}\n" for name in ["", *wrong])
        found = torch.tensor(list(lines.encode()), dtype=torch.uint8)
        self.collectives.storage_barrier()
        found_by_all = bytes(self.collectives.all_gather(found.to(device)).tolist()).decode()
        return next((name for name in found_by_all.split("\n") if name), "")

    def _choose(self, device: torch.device, damaged: Sequence[str]) -> CompleteCheckpoint | None:
        """The newest complete checkpoint as worker 0 finds it.

        Where worker 0 cannot read storage, all workers raise its error.
        """
        found: CompleteCheckpoint | DataError | None = None
        if self.collectives.rank == 0:
            try:
                found = retry_storage(
                    newest_complete, self.folder, self.say, damaged, say=self.say_own
                )
            except DataError as error:
                found = error
        found = self.collectives.broadcast_object(found, device)
        if isinstance(found, DataError):
            raise found
        return found

    def _send(self, scratch: Scratch, target: str, score: float | None) -> None:
        """Send this worker's files to storage, the manifest last; then remove old checkpoints."""
        try:
            self._send_files(scratch.path, target, score)
        except BaseException:
            with contextlib.suppress(DataError):  # the first error counts
                storage.remove(target)  # it takes room
            raise
        finally:
            scratch.remove()
        if self.collectives.rank == 0:
            retry_storage(self.remove_old_checkpoints, say=self.say_own)

    def _send_files(self, local: str, target: str, score: float | None) -> None:
        names = sorted(
            os.path.relpath(os.path.join(parent, file), local).replace(os.sep, "/")
            for parent, _, files in os.walk(local)
            for file in files
        )
        sizes = {name: os.path.getsize(os.path.join(local, name)) for name in names}
        checksums = {name: checksum(os.path.join(local, name)) for name in names}
        for name in names:
            source = os.path.join(local, name)
            retry_storage(storage.put_file, source, storage.join(target, name), say=self.say_own)
        manifest = Manifest(
            world_size=self.collectives.world_size, score=score, files=sizes, crc32=checksums
        )
        path = storage.join(target, manifest_name(self.collectives.rank))
        retry_storage(storage.write_json, path, manifest, say=self.say_own)

    def remove_old_checkpoints(self) -> None:
        """Remove checkpoints that the policy does not keep.

        Incomplete ones that are older than the newest complete one are removed too.
        """
        found = {path: inspect_checkpoint(path) for path in step_folders(self.folder)}
        complete = [one for one in found.values() if isinstance(one, CompleteCheckpoint)]
        removed = {checkpoint.path for checkpoint in self.policy.to_remove(complete)}
        newest = max((checkpoint.path for checkpoint in complete), default="")
        for path, one in found.items():
            if path in removed or (isinstance(one, str) and path < newest):
                storage.remove(path)


def zero_stages(engines: Mapping[str, Engine]) -> dict[str, int]:
    """ZeRO stage of each engine."""
    return {name: int(engine.zero_optimization_stage()) for name, engine in engines.items()}


def check_stages(state: SavedState, engines: Mapping[str, Engine], path: str) -> None:
    """Check that the engines have the ZeRO stages that the checkpoint was written with.

    Raises:
        ConfigError: they have others.
    """
    stages = zero_stages(engines)
    if state["zero_stages"] != stages:
        before = max(state["zero_stages"].values())
        raise ConfigError(
            f"The checkpoint {path} was written with train.zero_stage={before}, but it is now "
            f"{max(stages.values())}. Set it back to {before} to resume, or remove "
            f"{os.path.dirname(path)} to train from the start."
        )


@contextlib.contextmanager
def _local_folder() -> Iterator[Scratch]:
    """A folder on this node's disk, which is removed only when the block fails.

    Raises:
        DataError: the disk is full.
    """
    scratch: Scratch | None = None
    try:
        scratch = Scratch("checkpoint")
        yield scratch
    except BaseException as error:
        if scratch is not None:
            scratch.remove()
        if disk_is_full(error):
            raise DataError(
                f"cannot write a checkpoint to {tempfile.gettempdir()}: "
                f"{str(error).splitlines()[0]}. Each worker needs room for its files there: free "
                "some space, or set TMPDIR to a larger disk. Earlier checkpoints are unchanged."
            ) from error
        raise


@contextlib.contextmanager
def fetched(
    chosen: CompleteCheckpoint, collectives: Collectives, say: Callable[[str], None]
) -> Iterator[str]:
    """A local folder with the files of a checkpoint that this worker loads.

    A local checkpoint is used where it is. From an object store each worker fetches its own files
    and those that worker 0 wrote for all; where another number of workers wrote it, the first
    worker of each node fetches all files for all workers there.
    """
    if storage.is_local(chosen.path):
        yield storage.local_path(chosen.path)
    elif len(chosen.files) == collectives.world_size:
        scratch = Scratch("resume")
        try:
            names = {*chosen.files[0], *chosen.files[collectives.rank]}
            fetch(chosen.path, names, scratch.path, say)
            yield scratch.path
        finally:
            scratch.remove()
    else:
        every = {name for files in chosen.files for name in files}
        with shared_folder(
            "resume", lambda folder: fetch(chosen.path, every, folder, say), collectives
        ) as folder:
            yield folder


def fetch(path: str, names: Iterable[str], folder: str, say: Callable[[str], None]) -> None:
    """Copy files of the folder `path` to the local `folder`."""
    for name in sorted(names):
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        retry_storage(storage.get_file, storage.join(path, name), target, say=say)
