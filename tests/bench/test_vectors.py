"""Real vectors of the benchmarks, and the options that these get."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bench import vectors
from smalti import shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("window", [1, 3])
def test_vectors_to_judge_by_are_of_other_images(tmp_path: Path, window: int) -> None:
    """20 images of 4 x 4 patches, each number that of its image."""
    x_NC = np.repeat(np.arange(20, dtype=np.float16), 16)[:, None].repeat(2, 1)
    columns = [["x"] * 320, list(range(16)) * 20, shards.list_column(x_NC)]
    shards.write_shard(str(tmp_path), "train/00000", pa.table(columns, shards.feature_schema(2)))
    held, train = vectors.stored(str(tmp_path), window, 9)
    assert held.shape == (9, 2 * window**2)
    assert not set(held.flatten().tolist()) & set(train.flatten().tolist())


def test_options_after_the_numbers_are_the_scripts_own() -> None:
    command = [sys.executable, "-m", "bench", "99", "--features", "out/features"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (2, "no such benchmark")
