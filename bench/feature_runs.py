"""A corpus of small pictures and its features, through Ray Data or a plain pool of processes, timed
without start-up.

The clock starts when `WARM` shards are on disk: by then every worker has loaded its model. It stops
when the driver has the last receipt. CPU-seconds are those of the whole tree of processes (Ray's
own too) from receipt `WARM` to the last: they tell of the work even where other programs share the
cores, and by kind of process where the time goes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from bench.pictures import save_encoder
from smalti import shards
from smalti.schema import Recipe
from smalti.workflows.features.featurizer import FeatureShard
from smalti.workflows.pipeline.shards import run_shards
from smalti.workflows.sources.generated import draw

IMAGE_SIZE, DISTINCT, WARM = 64, 1000, 4
KINDS = (  # the first that is found counts
    ("worker", "MapWorker"),
    ("worker", "spawn_main"),
    ("ray data's actors", "ray::"),
    ("dashboard", "dashboard"),
    ("agents", "agent"),
    ("gcs", "gcs_server"),
    ("raylet", "raylet"),
)
_worker: Any = None


def prepare(folder: str, num_shards: int) -> str:
    """`corpus/` with shards of 1,000 PNGs of 64 px and `encoder/`; returns what the encoder is, in
    words.
    """
    drawn = [draw(0, "bench", index, IMAGE_SIZE) for index in range(DISTINCT)]
    for number in range(num_shards):
        rows = [
            {
                "image_id": f"{number:05d}-{index:05d}",
                "image": data,
                "width": IMAGE_SIZE,
                "height": IMAGE_SIZE,
                "caption": caption,
                "label": label,
                "source": "generated",
                "qa": [],
            }
            for index, (data, caption, label, _) in enumerate(drawn)
        ]
        shards.write_shard(
            f"{folder}/corpus",
            shards.shard_key("train", number),
            pa.Table.from_pylist(rows, shards.CORPUS),
        )
    return save_encoder(f"{folder}/encoder", IMAGE_SIZE, 8, 128, 3)


def recipe(workers: int) -> Recipe:
    """16 patches an image, `workers` actors of one core."""
    return Recipe.model_validate(
        {
            "corpus": {"image_size": IMAGE_SIZE},
            "features": {"patches": 16},
            "resources": {"actors": workers},
        }
    )


@dataclass(frozen=True)
class Measured:
    """Images a second, images a CPU-second, a digest of all shards, CPU-seconds of each kind of
    process, and the seconds from the last shard's writing to its receipt.
    """

    rate: float
    cpu_rate: float
    digest: str
    cpu_s: dict[str, float]
    tail_s: float


def through_ray(folder: str, workers: int) -> Measured:
    """The stage's own pipeline; a Ray session must be open."""
    given = recipe(workers)
    args = (f"{folder}/out", f"{folder}/corpus", f"{folder}/encoder", given, IMAGE_SIZE)
    return _measure(
        folder,
        run_shards(shards.list_shards(f"{folder}/corpus"), FeatureShard, args, given.resources),
    )


def through_pool(folder: str, workers: int) -> Measured:
    """The same worker's functions in a multiprocessing pool, a shard a call."""
    args = (f"{folder}/out", f"{folder}/corpus", f"{folder}/encoder", recipe(workers), IMAGE_SIZE)
    with multiprocessing.get_context("spawn").Pool(workers, _start, (args,)) as pool:
        return _measure(folder, pool.imap_unordered(_one, shards.list_shards(f"{folder}/corpus")))


def _start(args: tuple[Any, ...]) -> None:
    global _worker
    _worker = FeatureShard(*args)


def _one(key: str) -> Any:
    return _worker.work(_worker.read(key))


def _measure(folder: str, results: Iterator[Any]) -> Measured:
    """Rates from the `WARM`-th shard to the last receipt; the output is taken away afterwards."""
    counted, warm, num_images = _CpuSeconds(), {}, 0
    for number, (_, images) in enumerate(results, 1):
        num_images += images
        ended, counts = time.time(), counted.by_kind()
        if number == WARM:
            warm = counts
    files = sorted(Path(folder, "out").rglob("*.parquet"))
    written = sorted(os.stat(file).st_mtime for file in files)
    digest = hashlib.sha256(
        b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    ).hexdigest()
    shutil.rmtree(Path(folder, "out"))
    timed = num_images * (len(written) - WARM) / len(written)
    cpu_s = {kind: seconds - warm.get(kind, 0.0) for kind, seconds in counts.items()}
    tail_s = ended - written[-1]
    return Measured(
        timed / (ended - written[WARM - 1]), timed / sum(cpu_s.values()), digest, cpu_s, tail_s
    )


class _CpuSeconds:
    """CPU-seconds of this process and all below it, those that have ended meanwhile included as
    last seen.
    """

    def __init__(self) -> None:
        self.seen: dict[tuple[int, float], tuple[str, float]] = {}

    def by_kind(self) -> dict[str, float]:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with suppress(psutil.Error):
                times = process.cpu_times()
                kind = "driver" if process == me else _kind(" ".join(process.cmdline()))
                self.seen[process.pid, process.create_time()] = kind, times.user + times.system
        totals: dict[str, float] = {}
        for kind, seconds in self.seen.values():
            totals[kind] = totals.get(kind, 0.0) + seconds
        return totals


def _kind(command: str) -> str:
    """What a process of a run is, by its command line: Ray renames its own."""
    for kind, word in KINDS:
        if word in command:
            return kind
    return "other"
