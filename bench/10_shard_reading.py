"""Goal 10: feature shards read, MB a CPU-second, against a Parquet column of list<float32>.

Both sides hold the same 64K vectors of 1152 numbers (half as many bytes here: they are float16),
are read whole from a warm file into a numpy matrix on one thread, in turns, five times; the medians
of CPU-seconds count. Quality: 1 when both matrices are equal to what was written, at their
precision.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.machine import report
from smalti import shards

NUM, DIM, TURNS, GOAL = 65_536, 1152, 5, 5.0


def cpu_seconds(read: Callable[[], np.ndarray]) -> float:
    """CPU-seconds of one reading, with a touch of every page of the result."""
    started = time.process_time()
    read().reshape(-1)[::1024].sum()
    return time.process_time() - started


def main() -> None:
    matrix = (
        np.random.default_rng(0).standard_normal((NUM, DIM), dtype=np.float32).astype(np.float16)
    )
    with tempfile.TemporaryDirectory() as folder:
        columns = [
            pa.array([f"{i // 256:06d}" for i in range(NUM)]),
            pa.array(np.arange(NUM, dtype=np.int32) % 256),
            shards.list_column(matrix),
        ]
        shards.write_shard(
            folder, "train/00000", pa.Table.from_arrays(columns, schema=shards.feature_schema(DIM))
        )
        plain = Path(folder, "plain.parquet")
        offsets = pa.array(np.arange(NUM + 1, dtype=np.int32) * DIM)
        lists = pa.ListArray.from_arrays(offsets, pa.array(matrix.astype(np.float32).reshape(-1)))
        pq.write_table(pa.table({"vector": lists}), plain)

        def ours() -> np.ndarray:
            return shards.vectors(shards.read_shard(folder, "train/00000", ["vector"]))

        def theirs() -> np.ndarray:
            column = pq.read_table(plain, use_threads=False).column("vector").combine_chunks()
            return column.flatten().to_numpy().reshape(-1, DIM)

        equal = np.array_equal(ours(), matrix) and np.array_equal(
            theirs(), matrix.astype(np.float32)
        )
        times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(TURNS)]
    ours_s, theirs_s = (statistics.median(side) for side in zip(*times, strict=True))
    ours_rate, theirs_rate = matrix.nbytes / 1e6 / ours_s, 2 * matrix.nbytes / 1e6 / theirs_s
    ratio = ours_rate / theirs_rate
    print(f"fixed-size binary {ours_rate:,.0f} MB a CPU-second, list<float32> {theirs_rate:,.0f}")
    report(10, ratio=ratio, quality=float(equal), met=bool(equal and ratio >= GOAL))


if __name__ == "__main__":
    main()
