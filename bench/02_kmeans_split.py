"""Goal 2: two-level k-means without polish, K shared out by cell size, against the equal split of
UniCode².

49K vectors × 1152 into 2,048 codes in 64 cells. In cells of unequal shares an iteration costs more:
the equal split gets one more, four for three, so that both take about as long. One thread, in
turns, medians of CPU-seconds; distortion on held-out vectors. Ratio: CPU-seconds of ours over those
of the equal split. Quality: ours over its distortion. `--features PATH [--window 3]` takes real
vectors; `--codes`, `--cells`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faiss
import torch

from bench import vectors
from bench.machine import medians, report
from bench.two_level import TwoLevel, distortion

VECTORS, WIDTH, HELD_OUT = 49_152, 1152, 8_192
RATIO, QUALITY = 1.1, 0.98


def main() -> None:
    options = argparse.ArgumentParser()
    vectors.add_options(options)
    options.add_argument("--codes", type=int, default=2_048)
    options.add_argument("--cells", type=int, default=64)
    asked = options.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    held, train = vectors.chosen(asked, HELD_OUT, VECTORS, WIDTH)
    made: dict[str, torch.Tensor] = {}
    shared = TwoLevel(asked.codes, asked.cells, iterations=3)
    equal = TwoLevel(asked.codes, asked.cells, iterations=4, split="equal")
    seconds = medians(
        {
            "proportional": lambda: made.update(proportional=shared.train(train).codes),
            "equal": lambda: made.update(equal=equal.train(train).codes),
        },
        asked.turns,
    )
    found = {name: distortion(held, codes) for name, codes in made.items()}
    print(
        f"{len(train):,} x {train.shape[1]} vectors ({vectors.described(asked)}) into {asked.codes} codes, {asked.cells} cells"
    )
    for name, took in seconds.items():
        print(f"{name}: {took:.2f} CPU-s, held-out distortion {found[name]:.6g}")
    ratio, quality = (
        seconds["proportional"] / seconds["equal"],
        found["proportional"] / found["equal"],
    )
    report(
        2,
        ratio=ratio,
        quality=quality,
        met=ratio <= RATIO and quality <= QUALITY,
        vectors=vectors.described(asked),
    )


if __name__ == "__main__":
    main()
