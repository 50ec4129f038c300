"""Goal 1: two-level k-means with two polish steps, 49K vectors × 1152 into 2,048 codes, against
flat k-means of faiss.

faiss runs 8 iterations over all vectors; scikit-learn's MiniBatchKMeans, one epoch of batches of
4,096, is a third side. One thread each, in turns, medians of CPU-seconds; distortion on held-out
vectors. Quality: ours over flat's distortion. `--features PATH [--window 3]` takes real vectors;
`--codes`, `--cells`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faiss
import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from bench import vectors
from bench.machine import medians, report
from bench.two_level import TwoLevel, distortion

VECTORS, WIDTH, HELD_OUT = 49_152, 1152, 8_192
RATIO, QUALITY = 4.0, 1.005


def flat(x_NC: np.ndarray, num: int) -> np.ndarray:
    """Centroids of faiss's k-means over all vectors."""
    machine = faiss.Kmeans(x_NC.shape[1], num, niter=8, seed=1, max_points_per_centroid=len(x_NC))
    machine.train(x_NC)
    return np.asarray(machine.centroids)


def mini_batch(x_NC: np.ndarray, num: int) -> np.ndarray:
    """Centroids of scikit-learn's mini-batch k-means."""
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        machine = MiniBatchKMeans(
            num, batch_size=4_096, max_iter=1, n_init=1, init="random", random_state=1
        )
        return np.asarray(machine.fit(x_NC).cluster_centers_)


def main() -> None:
    options = argparse.ArgumentParser()
    vectors.add_options(options)
    options.add_argument("--codes", type=int, default=2_048)
    options.add_argument("--cells", type=int, default=64)
    asked = options.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    held, train = vectors.chosen(asked, HELD_OUT, VECTORS, WIDTH)
    made: dict[str, np.ndarray] = {}
    ours = TwoLevel(asked.codes, asked.cells, iterations=5, sample=16_384, polish=2)
    seconds = medians(
        {
            "two-level": lambda: made.update(ours=ours.train(train).codes.numpy()),
            "flat": lambda: made.update(flat=flat(train.numpy(), asked.codes)),
            "mini-batch": lambda: made.update(mini_batch=mini_batch(train.numpy(), asked.codes)),
        },
        asked.turns,
    )
    found = {name: distortion(held, codes) for name, codes in made.items()}
    print(
        f"{len(train):,} x {train.shape[1]} vectors ({vectors.described(asked)}) into {asked.codes} codes, {asked.cells} cells"
    )
    for (name, took), value in zip(seconds.items(), found.values(), strict=True):
        print(
            f"{name}: {took:.2f} CPU-s, held-out distortion {value:.6g}, {value / found['flat']:.4f} of flat's"
        )
    ratio, quality = seconds["flat"] / seconds["two-level"], found["ours"] / found["flat"]
    report(
        1,
        ratio=ratio,
        quality=quality,
        met=ratio >= RATIO and quality <= QUALITY,
        mini_batch_ratio=round(seconds["mini-batch"] / seconds["two-level"], 2),
        mini_batch_quality=round(found["mini_batch"] / found["flat"], 4),
        vectors=vectors.described(asked),
    )


if __name__ == "__main__":
    main()
