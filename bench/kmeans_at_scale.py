"""The stage `codebook` at the paper's shape in small: `python bench/kmeans_at_scale.py
paper|many|half … [--folder DIR]`.

`paper`: 2M vectors of 256 dimensions, K1 = 200, K = 20,000, one polish step. `many`: 2M vectors of
64 dimensions, K1 = 1,000, K = 500,000, four vectors a code; `half`: the same vectors with K =
250,000: nothing may be quadratic in K. Vectors are drawn around planted centres of two levels; 1 %
are held out. The whole stage runs on Ray as `smalti codebook` runs it, with its checkpoints and
scores. Printed: time, the peak memory of each process, the most disk, distortion against that of
the planted centres. Not a goal, so `make bench` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import pyarrow as pa

from bench.machine import machine
from smalti import shards
from smalti.schema import Recipe
from smalti.workflows.codebook import stage as codebook
from smalti.workflows.pipeline.stage import StageRun, run_stage

SHARD, HELD_OUT = 40_000, 20_000
NOISE = 0.5


@dataclass(frozen=True)
class Shape:
    """Sizes of one run: `planted` centres in `groups` groups."""

    vectors: int
    dim: int
    coarse: int
    size: int
    groups: int
    planted: int
    polish: int = 0


SHAPES = {
    "paper": Shape(2_000_000, 256, 200, 20_000, groups=300, planted=10_000, polish=1),
    "many": Shape(2_000_000, 64, 1_000, 500_000, groups=1_000, planted=100_000),
    "half": Shape(2_000_000, 64, 1_000, 250_000, groups=1_000, planted=100_000),
}


def plant(shape: Shape, run: StageRun) -> dict[str, int]:
    """Write feature shards: float16 vectors at distance² `NOISE² · dim` from their planted centre."""
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((shape.groups, shape.dim), dtype=np.float32)
    centres = groups[rng.integers(shape.groups, size=shape.planted)]
    centres = centres + 0.7 * rng.standard_normal(centres.shape, dtype=np.float32)
    for number in range(-1, shape.vectors // SHARD):
        rows = HELD_OUT if number < 0 else SHARD
        x_NC = centres[rng.integers(shape.planted, size=rows)]
        x_NC = (x_NC + NOISE * rng.standard_normal(x_NC.shape, dtype=np.float32)).astype(np.float16)
        columns = [
            pa.array(["x"] * rows),
            pa.array(np.arange(rows, dtype=np.int32)),
            shards.list_column(x_NC),
        ]
        key = shards.shard_key("val", 0) if number < 0 else shards.shard_key("train", number)
        shards.write_shard(run.path, key, pa.table(columns, shards.feature_schema(shape.dim)))
    return {"vectors": shape.vectors}


class Peaks(threading.Thread):
    """Watches the memory of its own, not shared with others, of this process and of its Ray
    workers, and a folder's size.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.driver = self.worker = self.disk = 0
        self.done = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.done.wait(0.5):
            self.driver = max(self.driver, self._own(me))
            self.disk = max(self.disk, self._on_disk())
            for child in me.children(recursive=True):
                try:
                    if child.name().startswith("ray::") or "ray::" in "".join(child.cmdline()[:1]):
                        self.worker = max(self.worker, self._own(child))
                except psutil.Error:
                    continue

    @staticmethod
    def _own(process: psutil.Process) -> int:
        info = process.memory_info()
        return int(info.rss - info.shared)

    def _on_disk(self) -> int:
        total = 0
        for path in Path(self.folder).rglob("*"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total


def measured(name: str, folder: str) -> dict[str, Any]:
    """Plant the vectors, run the stage, and tell what it took."""
    shape = SHAPES[name]
    recipe = Recipe.model_validate(
        {
            "out": folder,
            "tracking": {"uri": "off"},
            "codebook": {"size": shape.size, "coarse": shape.coarse, "polish": shape.polish},
            "resources": {"actors": 2, "readers": 2},
        }
    )
    run_stage(recipe, "features", "features", {}, {}, lambda run: plant(shape, run))
    peaks = Peaks(folder)
    peaks.start()
    started = time.monotonic()
    made = codebook.run(recipe)
    seconds = time.monotonic() - started
    peaks.done.set()
    peaks.join()
    return {
        "run": name,
        **asdict(shape),
        "seconds": round(seconds, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "driver_peak_mb": round(peaks.driver / 1e6),
        "worker_peak_mb": round(peaks.worker / 1e6),
        "disk_peak_mb": round(peaks.disk / 1e6),
        "planted_distortion": round(NOISE**2 * shape.dim, 4),
        **made.counts,
        **{
            key: round(float(value), 4)
            for key, value in made.scores.items()
            if isinstance(value, int | float)
        },
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", choices=SHAPES, nargs="+")
    parser.add_argument(
        "--folder", help="where vectors and codebook go; default: a temporary folder"
    )
    arguments = parser.parse_args()
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(json.dumps(measured(name, folder)), flush=True)


if __name__ == "__main__":
    main()
