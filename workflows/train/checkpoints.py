"""Checkpoints of a training run: engines' states, the task's, and where the loop was, in one folder
a step.

Each worker writes its files to its own disk, then goes on training while a thread brings them to
storage and, last of all, a manifest of their names, sizes and checksums. A checkpoint is whole when
the manifests of all its workers stand and every file they name has its size; one that is not was
cut short, and is passed over. So is one in which a file has another checksum when it is loaded: it
was damaged later.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from smalti import storage
from smalti.errors import ConfigError, DataError
from smalti.workflows.pipeline.retry import chain_of, retry_storage
from smalti.workflows.train import reshard
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.scratch import Scratch, filled, takes_no_more
from smalti.workflows.train.task import Task

STATE_FILE = "loop.json"
TASK_FILE = "task.pt"
TAG = "engine"
STEP = re.compile(r"step-(\d{9})$")
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Whole:
    """A whole checkpoint: the step, its folder, its files by worker, the score it was saved with,
    checksums of files.
    """

    step: int
    path: str
    files: tuple[tuple[str, ...], ...]
    score: float | None
    sums: Mapping[str, int] = field(default_factory=dict)


def metric_of(best: str) -> str:
    """The metric that `train.best` names."""
    return best.removeprefix("max:")


def check_best(best: str | None, logged: Collection[str]) -> None:
    """ConfigError when `train.best` names none of the metrics that are logged."""
    if best is not None and metric_of(best) not in logged:
        names = ", ".join(sorted(logged))
        raise ConfigError(
            f"train.best={best} names no metric that this training logs from the start; it logs {names}."
        )


def step_folder(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:09d}"


def manifest_name(rank: int) -> str:
    """Name of a worker's manifest."""
    return f"manifest-{rank:05d}.json"


def look(path: str) -> Whole | str:
    """The checkpoint in the folder `path`, or what is wrong with it."""
    sizes = storage.sizes_bytes(path)
    manifests: list[dict[str, Any]] = []
    while not manifests or len(manifests) < manifests[0]["world_size"]:
        name = manifest_name(len(manifests))
        if name not in sizes:
            return f"it has no {name}"
        try:
            manifest = read_manifest(storage.join(path, name))
        except DataError as error:
            if any(isinstance(cause, FileNotFoundError) for cause in chain_of(error)):
                return f"it has no {name}"  # removed after the listing
            raise
        if manifest is None:
            return f"its {name} is torn"
        manifests.append(manifest)
    for manifest in manifests:
        for name, size in manifest["files"].items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != size:
                return f"{name} holds {sizes[name]:,} bytes of {size:,}"
    found = STEP.search(path)
    assert found is not None
    files = tuple(tuple(manifest["files"]) for manifest in manifests)
    sums = {
        name: total for manifest in manifests for name, total in manifest.get("crc32", {}).items()
    }
    return Whole(int(found[1]), path, files, manifests[0]["score"], sums)


def read_manifest(path: str) -> dict[str, Any] | None:
    """A worker's manifest; None where it is torn or damaged.

    DataError: storage does not answer, which says nothing of it.
    """
    try:
        found = json.loads(storage.read_bytes(path))
    except ValueError:
        return None
    kinds = {"world_size": int, "score": float | int | None, "files": dict}
    whole = isinstance(found, dict) and all(
        name in found and isinstance(found[name], kinds[name]) for name in kinds
    )
    return found if whole and found["world_size"] > 0 else None


def checksum(path: str) -> int:
    """CRC-32 of a local file."""
    total = 0
    with open(path, "rb") as file:
        while part := file.read(CHUNK_BYTES):
            total = zlib.crc32(part, total)
    return total


def newest(folder: str, say: Callable[[str], None], damaged: Sequence[str] = ()) -> Whole | None:
    """The newest whole checkpoint in `folder`, but for the `damaged`; a line is said for each newer
    one not whole.
    """
    for name in reversed(storage.list_names(folder)):
        if STEP.search(name) and storage.join(folder, name) not in damaged:
            found = look(storage.join(folder, name))
            if isinstance(found, Whole):
                return found
            say(f"checkpoint {storage.join(folder, name)} is passed over: {found}")
    return None


def to_drop(whole: Sequence[Whole], keep: int, best: str | None) -> list[Whole]:
    """Those of the checkpoints that are neither among the `keep` newest nor the best by score
    (`max:NAME`: highest).
    """
    kept = sorted(whole, key=lambda c: c.step)[-keep:]
    scored = [c for c in whole if c.score is not None and math.isfinite(c.score)]
    if best is not None and scored:
        sign = -1.0 if best.startswith("max:") else 1.0
        kept.append(min(scored, key=lambda c: (sign * float(c.score or 0.0), c.step)))
    return [c for c in whole if c not in kept]


class Checkpoints:
    """The checkpoints of a run in `folder`, seen by one of its workers; all call `save`, `wait` and
    `load` alike.
    """

    def __init__(
        self,
        folder: str,
        collectives: Collectives,
        *,
        keep: int = 2,
        best: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.collectives, self.keep, self.best, self.say = (
            folder,
            collectives,
            keep,
            best,
            say,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sending: Future[None] | None = None

    def save(self, engines: Mapping[str, Any], task: Task, state: dict[str, Any]) -> None:
        """Write a checkpoint of all that a resumed run needs; `state`: "step" (steps done) and
        "history" at least.

        Returns when it stands on this worker's disk; errors of sending it are raised by the next
        `save` or `wait`.
        """
        self.wait()
        self.collectives.storage_barrier()  # the one before was sent
        score = self._score(state)
        rank, target = self.collectives.rank, storage.join(self.folder, step_folder(state["step"]))
        with _made_here() as scratch:
            local = scratch.path
            for name, engine in engines.items():
                engine.save_checkpoint(os.path.join(local, name), tag=TAG)
            if rank == 0:
                torch.save(task.state_dict(), os.path.join(local, TASK_FILE))
                stages = {
                    name: int(engine.zero_optimization_stage()) for name, engine in engines.items()
                }
                with open(os.path.join(local, STATE_FILE), "w") as out:
                    json.dump(
                        {**state, "world_size": self.collectives.world_size, "zero_stages": stages},
                        out,
                    )
                retry_storage(
                    storage.remove, target, say=self.say
                )  # an incomplete checkpoint of an earlier try
            self.collectives.storage_barrier()
        self._sending = self._thread.submit(self._send, scratch, target, score)

    def wait(self) -> None:
        """Return when this worker's part of the last checkpoint is in storage; raises what went
        wrong on the way.
        """
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def load(self, engines: Mapping[str, Any], task: Task) -> dict[str, Any] | None:
        """Take back the newest whole checkpoint; its state, or None when there is none.

        ZeRO's optimizer states, which are cut by worker, are cut anew when another number of
        workers wrote them. ConfigError: written with other ZeRO stages. TrainingError: it lacks an
        engine, or one does not fit.
        """
        device = next(iter(engines.values())).device
        damaged: list[str] = []
        while (chosen := self._choose(device, damaged)) is not None:
            with fetched(chosen, self.collectives, self.say) as folder:
                wrong = self._changed(chosen, folder, device)
                if not wrong:
                    return self._take(chosen, folder, engines, task)
            self.say(
                f"checkpoint {chosen.path} is passed over: {wrong} is damaged (another checksum than when written)"
            )
            damaged.append(chosen.path)
        return None

    def _take(
        self, chosen: Whole, folder: str, engines: Mapping[str, Any], task: Task
    ) -> dict[str, Any]:
        """Load what lies in the local `folder`; the state."""
        path = chosen.path
        state: dict[str, Any] = storage.read_json(os.path.join(folder, STATE_FILE))
        check_stages(state, engines, path)
        cut = state["world_size"] != self.collectives.world_size
        for name, engine in engines.items():
            source = os.path.join(folder, name)
            if cut and engine.zero_optimization_stage():
                reshard.load(engine, source, TAG, self.collectives, told=f"{path}/{name}")
            else:
                reshard.load_engine(engine, source, TAG, told=f"{path}/{name}")
        device = next(iter(engines.values())).device
        task.load_state_dict(
            torch.load(os.path.join(folder, TASK_FILE), map_location=device, weights_only=True)
        )
        self.collectives.storage_barrier()
        return state

    def _changed(self, chosen: Whole, folder: str, device: torch.device) -> str:
        """Name of a file that is not what was written, the same on every worker, or ""; each looks
        at its share.
        """
        ranks = range(self.collectives.rank, len(chosen.files), self.collectives.world_size)
        own = [name for rank in ranks for name in chosen.files[rank] if name in chosen.sums]
        wrong = [name for name in own if checksum(os.path.join(folder, name)) != chosen.sums[name]]
        told = torch.tensor(
            list("".join(f"{name}\n" for name in ["", *wrong]).encode()), dtype=torch.uint8
        )
        self.collectives.storage_barrier()
        all_told = bytes(self.collectives.all_gather(told.to(device)).tolist()).decode()
        return next((name for name in all_told.split("\n") if name), "")

    def _choose(self, device: torch.device, damaged: Sequence[str]) -> Whole | None:
        """What worker 0 finds to be the newest whole checkpoint; where it cannot look, all workers
        get its error.
        """
        found: Whole | DataError | None = None
        if self.collectives.rank == 0:
            try:
                found = retry_storage(newest, self.folder, self.say, damaged, say=self.say)
            except DataError as error:
                found = error
        found = self.collectives.broadcast_object(found, device)
        if isinstance(found, DataError):
            raise found
        return found

    def _score(self, state: Mapping[str, Any]) -> float | None:
        """The last logged value of the metric that names the best checkpoint."""
        rows = state.get("history", [])
        values = (
            [row[metric_of(self.best)] for row in rows if metric_of(self.best) in row]
            if self.best
            else []
        )
        return float(values[-1]) if values else None

    def _send(self, scratch: Scratch, target: str, score: float | None) -> None:
        local = scratch.path
        try:
            names = sorted(
                os.path.relpath(os.path.join(parent, file), local).replace(os.sep, "/")
                for parent, _, files in os.walk(local)
                for file in files
            )
            sizes = {name: os.path.getsize(os.path.join(local, name)) for name in names}
            sums = {name: checksum(os.path.join(local, name)) for name in names}
            for name in names:
                retry_storage(
                    storage.put_file,
                    os.path.join(local, name),
                    storage.join(target, name),
                    say=self.say,
                )
            manifest = {
                "world_size": self.collectives.world_size,
                "score": score,
                "files": sizes,
                "crc32": sums,
            }
            path = storage.join(target, manifest_name(self.collectives.rank))
            retry_storage(storage.write_json, path, manifest, say=self.say)
        except BaseException:
            with contextlib.suppress(
                DataError
            ):  # the first error counts; what is half there takes room
                storage.remove(target)
            raise
        finally:
            scratch.remove()
        if self.collectives.rank == 0:
            retry_storage(self._drop, say=self.say)

    def _drop(self) -> None:
        """Remove what is not to be kept; of those older than the newest whole one also what is not
        whole.
        """
        folders = [
            storage.join(self.folder, name)
            for name in storage.list_names(self.folder)
            if STEP.search(name)
        ]
        looked = {path: look(path) for path in folders}
        whole = [found for found in looked.values() if isinstance(found, Whole)]
        dropped = {found.path for found in to_drop(whole, self.keep, self.best)}
        last = max((found.path for found in whole), default="")
        for path, found in looked.items():
            if path in dropped or (isinstance(found, str) and path < last):
                storage.remove(path)


def check_stages(state: Mapping[str, Any], engines: Mapping[str, Any], path: str) -> None:
    """ConfigError unless the engines have the ZeRO stages that the checkpoint was written with."""
    stages = {name: int(engine.zero_optimization_stage()) for name, engine in engines.items()}
    if state["zero_stages"] != stages:
        was = max(state["zero_stages"].values())
        raise ConfigError(
            f"The checkpoint {path} was written with train.zero_stage={was}, and now it is {max(stages.values())}. "
            f"Set it back to go on, or remove {os.path.dirname(path)} to begin again."
        )


@contextlib.contextmanager
def _made_here() -> Iterator[Scratch]:
    """A folder on this machine's disk that stays when the block ends well.

    DataError: the disk holds no more.
    """
    scratch: Scratch | None = None
    try:
        scratch = Scratch("checkpoint")
        yield scratch
    except BaseException as error:
        if scratch is not None:
            scratch.remove()
        if takes_no_more(error):
            raise DataError(
                f"cannot write a checkpoint to {tempfile.gettempdir()}: {str(error).splitlines()[0]}. Each worker needs "
                "room for its part there: free some space, or set TMPDIR to a larger disk. The checkpoints before stand."
            ) from error
        raise


@contextlib.contextmanager
def fetched(chosen: Whole, collectives: Collectives, say: Callable[[str], None]) -> Iterator[str]:
    """A local folder with the checkpoint's files, all of them where it is local already.

    From an object store each worker fetches what it loads (its own files, and what worker 0 wrote
    for all); where another number of workers wrote it, the first worker of each machine fetches all
    files for all workers there.
    """
    if storage.is_local(chosen.path):
        yield storage.local_path(chosen.path)
    elif len(chosen.files) == collectives.world_size:
        scratch = Scratch("resume")
        try:
            fetch(
                chosen.path, {*chosen.files[0], *chosen.files[collectives.rank]}, scratch.path, say
            )
            yield scratch.path
        finally:
            scratch.remove()
    else:
        every = {name for files in chosen.files for name in files}
        with filled(
            "resume", lambda folder: fetch(chosen.path, every, folder, say), collectives
        ) as folder:
            yield folder


def fetch(path: str, names: Iterable[str], folder: str, say: Callable[[str], None]) -> None:
    """Bring files of the folder `path` to the local `folder`."""
    for name in sorted(names):
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        retry_storage(
            storage.get_file, storage.join(path, name), os.path.join(folder, name), say=say
        )
