"""Goal 9: features of 24,000 images through Ray Data, images a second, against the same worker
under multiprocessing.

Two workers of one core a side, shards of 1,000 pictures of 64 px, start-up left out, in turns;
medians of wall-clock rates. `cpu_ratio` is of rates by CPU-seconds, which other programs on the
machine disturb less. Quality: 1 when all shards of every turn are the same bytes on both sides. An
argument: how many shards instead of 24.
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

SHARDS, WORKERS, TURNS, GOAL = 24, 2, 3, 0.95


def by_process(side: feature_runs.Measured) -> str:
    return ", ".join(
        f"{kind} {seconds:.2f}"
        for kind, seconds in sorted(side.cpu_s.items(), key=lambda item: -item[1])
    )


def main() -> None:
    num_shards = int(sys.argv[1]) if len(sys.argv) > 1 else SHARDS
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        print(feature_runs.prepare(folder, num_shards))
        with ensure_ray(feature_runs.recipe(WORKERS)):
            for _ in range(TURNS):
                ray, pool = (
                    feature_runs.through_ray(folder, WORKERS),
                    feature_runs.through_pool(folder, WORKERS),
                )
                print(
                    f"Ray Data {ray.rate:,.0f} images/s, {ray.cpu_rate:,.0f} a CPU-second; pool {pool.rate:,.0f}, "
                    f"{pool.cpu_rate:,.0f}; load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
                print(
                    f"  receipt of the last shard after {ray.tail_s:.2f} and {pool.tail_s:.2f} s; CPU-seconds of Ray Data: {by_process(ray)}"
                )
                turns.append((ray, pool))
    ratio, cpu_ratio = (
        statistics.median(getattr(ray, kind) for ray, _ in turns)
        / statistics.median(getattr(pool, kind) for _, pool in turns)
        for kind in ("rate", "cpu_rate")
    )
    spent = {
        kind: statistics.median(ray.cpu_s.get(kind, 0.0) for ray, _ in turns)
        for kind in turns[0][0].cpu_s
    }
    shares = {kind: round(seconds / sum(spent.values()), 4) for kind, seconds in spent.items()}
    equal = len({side.digest for turn in turns for side in turn}) == 1
    met = bool(equal and ratio >= GOAL)
    report(
        9,
        ratio=ratio,
        quality=float(equal),
        met=met,
        cpu_ratio=round(cpu_ratio, 3),
        cpu_shares=shares,
    )


if __name__ == "__main__":
    main()
