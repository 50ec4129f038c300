"""Scaling (goal "15"): a pass of k-means with two workers of one core, vectors a second, against
one worker.

A Lloyd pass of the stage `codebook` over 1M planted vectors of 256 numbers, 4,096 codes in 64
cells, in 16 chunks; start-up left out, in turns; medians of wall-clock rates. It needs two cores
that nothing else uses: the load before each turn is printed. Quality: 1 when the codes are the same
bytes whatever the number of workers. `--vectors`, `--turns`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.kmeans_at_scale import Shape, plant
from bench.machine import report
from smalti.schema import Recipe
from smalti.tokenizers import kmeans
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.codebook import passes
from smalti.workflows.codebook.passes import Chunk
from smalti.workflows.codebook.tree import Tree
from smalti.workflows.pipeline.stage import run_stage

DIM, CODES, CELLS, CHUNKS, GOAL = 256, 4_096, 64, 16, 1.7


def start(parts: list[Chunk]) -> Tree:
    """Codes and cells drawn from the vectors, each code in its nearest cell."""
    x_NC = next(iter(parts[0].vectors()))
    codes_KC, cells_PC = x_NC[:CODES].clone(), x_NC[-CELLS:].clone()
    return Tree(cells_PC, codes_KC, kmeans.assign(codes_KC, cells_PC)[0]).in_cell_order()


def one_pass(parts: list[Chunk], tree: Tree, workers: int) -> tuple[float, torch.Tensor]:
    """Vectors a second of a Lloyd iteration, and the codes after it."""
    mine = tree.with_codes(tree.codes.clone())
    started = time.monotonic()
    moved, _, _ = passes.lloyd(parts, mine, workers)
    return sum(chunk.rows for chunk in parts) / (time.monotonic() - started), moved.codes


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--vectors", type=int, default=1_000_000)
    options.add_argument("--turns", type=int, default=3)
    asked = options.parse_args()
    shape = Shape(asked.vectors, DIM, CELLS, CODES, groups=64, planted=4_096)
    turns, made = [], []
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate(
            {"out": folder, "tracking": {"uri": "off"}, "resources": {"actors": 2}}
        )
        features = run_stage(recipe, "features", "features", {}, {}, lambda run: plant(shape, run))
        parts = passes.chunks(features.path, "train", asked.vectors // CHUNKS)
        tree = start(parts)
        with ensure_ray(recipe):
            one_pass(parts[:2], tree, 2)  # starts the workers
            for _ in range(asked.turns):
                load = os.getloadavg()[0]
                (one, codes), (two, codes_by_two) = (
                    one_pass(parts, tree, workers) for workers in (1, 2)
                )
                print(
                    f"1 worker {one:,.0f} vectors/s, 2 workers {two:,.0f}; load before {load:.1f}",
                    flush=True,
                )
                turns.append((one, two))
                made += [codes, codes_by_two]
    one, two = (statistics.median(side) for side in zip(*turns, strict=True))
    equal = all(torch.equal(codes, made[0]) for codes in made)
    report(15, ratio=two / one, quality=float(equal), met=bool(equal and two / one >= GOAL))


if __name__ == "__main__":
    main()
