"""Goal 5: counts and sums of 8,192 vectors of width 48 over 16,384 codes, against a one-hot matrix
product.

One thread, in turns; the medians of CPU-seconds count. Quality: 1 when both give the same counts,
and sums to 1e-4.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import machine
from bench.turns import in_turns
from smalti.tokenizers.quantizers import EMAStats

NUM, CODES, DIM, TURNS, GOAL, CALLS = 8192, 16_384, 48, 5, 100.0, 20


def one_hot(h_MD: Tensor, ids_M: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (K,) and sums (K, D) through a matrix of zeros and ones."""
    hot_MK = F.one_hot(ids_M, CODES).float()
    return hot_MK.sum(0), hot_MK.T @ h_MD


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    h_MD = torch.randn(NUM, DIM, generator=generator)
    ids_M = torch.randint(CODES, (NUM,), generator=generator)

    def ours() -> None:
        for _ in range(CALLS):
            EMAStats.of(h_MD, ids_M, CODES)

    ours_s, theirs_s = in_turns(ours, lambda: one_hot(h_MD, ids_M), TURNS)
    ours_s /= CALLS
    stats, (counts_K, sums_KD) = EMAStats.of(h_MD, ids_M, CODES), one_hot(h_MD, ids_M)
    quality = float(
        torch.equal(stats.counts, counts_K) and torch.allclose(stats.sums, sums_KD, atol=1e-4)
    )
    ratio = theirs_s / ours_s
    print(f"index_add {ours_s * 1e3:.2f} ms, one-hot {theirs_s * 1e3:.0f} ms")
    result = {
        "goal": 5,
        "ratio": round(ratio, 1),
        "quality": quality,
        "met": bool(ratio >= GOAL and quality == 1.0),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
