"""Scaling (goal "13"): feature extraction with two workers of one core, images a second, against
one worker.

The stage's own pipeline over 16,000 pictures of 64 px, start-up left out, in turns; medians of
wall-clock rates. It needs two cores that nothing else uses: the load before each turn is printed.
Quality: 1 when all shards are the same bytes whatever the number of workers. An argument: how many
shards instead of 16.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import feature_runs
from bench.machine import report
from smalti.workflows.cluster.session import ensure_ray

SHARDS, TURNS, GOAL = 16, 3, 1.7


def main() -> None:
    num_shards = int(sys.argv[1]) if len(sys.argv) > 1 else SHARDS
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        print(feature_runs.prepare(folder, num_shards))
        with ensure_ray(feature_runs.recipe(2)):
            for _ in range(TURNS):
                load = os.getloadavg()[0]
                one, two = feature_runs.through_ray(folder, 1), feature_runs.through_ray(folder, 2)
                print(
                    f"1 worker {one.rate:,.0f} images/s, 2 workers {two.rate:,.0f}; load before {load:.1f}",
                    flush=True,
                )
                turns.append((one, two))
    ratio = statistics.median(two.rate for _, two in turns) / statistics.median(
        one.rate for one, _ in turns
    )
    equal = len({side.digest for turn in turns for side in turn}) == 1
    report(13, ratio=ratio, quality=float(equal), met=bool(equal and ratio >= GOAL))


if __name__ == "__main__":
    main()
