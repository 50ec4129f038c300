"""Goal 4: nearest of 16,384 codes of width 48 for 8,192 vectors, against the full matrix of
distances.

The other side is what vector-quantize-pytorch does: ‖x‖² + ‖c‖² − 2 x·c for all pairs, clamped,
square root, argmax of the negative. One thread, in turns; the medians of CPU-seconds count. Memory
is the peak of resident memory in a process of its own. Quality: the share of vectors that get the
code which float64 says is nearest (or one at an equal distance to 1e-6).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench.machine import machine
from bench.turns import in_turns, peak_bytes
from smalti.tokenizers.flat_search import nearest

NUM, CODES, DIM, TURNS, GOAL, GOAL_MEMORY = 8192, 16_384, 48, 7, 2.0, 1 / 16


def full_matrix(z_MD: Tensor, codes_KD: Tensor) -> Tensor:
    """All distances at once."""
    x2_M1, y2_1K = z_MD.pow(2).sum(-1)[:, None], codes_KD.pow(2).sum(-1)[None]
    xy_MK = torch.einsum("id,jd->ij", z_MD, codes_KD) * -2
    return (-(x2_M1 + y2_1K + xy_MK).clamp(min=1e-8).sqrt()).argmax(-1)


def right(z_MD: Tensor, codes_KD: Tensor, ids_M: Tensor) -> float:
    """Share of vectors whose code is the nearest, in float64."""
    hits = 0
    for z_mD, ids_m in zip(z_MD.double().split(512), ids_M.split(512), strict=True):
        distance_mK = torch.cdist(z_mD, codes_KD.double())
        hits += int(
            (distance_mK.gather(1, ids_m[:, None])[:, 0] <= distance_mK.amin(1) + 1e-6).sum()
        )
    return hits / len(ids_M)


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    codes_KD = torch.randn(CODES, DIM, generator=generator)
    z_MD = codes_KD[torch.randint(CODES, (NUM,), generator=generator)] + torch.randn(
        NUM, DIM, generator=generator
    )

    def ours() -> Tensor:
        return nearest(z_MD, codes_KD)

    def theirs() -> Tensor:
        return full_matrix(z_MD, codes_KD)

    # what is loaded once is no scratch
    (
        nearest(z_MD[:8], codes_KD),
        full_matrix(z_MD[:8], codes_KD),
    )
    ours_bytes, theirs_bytes = peak_bytes(ours), peak_bytes(theirs)
    ours_s, theirs_s = in_turns(ours, theirs, TURNS)
    quality = right(z_MD, codes_KD, ours())
    ratio, memory = theirs_s / ours_s, ours_bytes / theirs_bytes
    print(
        f"ours {ours_s:.3f} s and {ours_bytes >> 20} MiB, full matrix {theirs_s:.3f} s and {theirs_bytes >> 20} MiB"
    )
    result = {
        "goal": 4,
        "ratio": round(ratio, 2),
        "memory": round(memory, 4),
        "quality": quality,
        "met": bool(ratio >= GOAL and memory <= GOAL_MEMORY and quality == 1.0),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
