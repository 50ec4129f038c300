"""Goal 6: nearest of a vector's own m = 12 pixel codes, against a flat search over all K·m codes
with the others masked.

K = 16,384 semantic codes, width 8, 1,024 vectors on both sides; then our side alone at K = 1,024
and 4,096 with 65,536 vectors (`growth`: the second over the first). One thread, in turns; the
medians of CPU-seconds count. Quality: the share of vectors with the same code on both sides.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench.machine import machine
from bench.turns import in_turns
from smalti.tokenizers.subcodes import SubCodebooks

SEMANTIC, SUB, DIM, NUM, TURNS, GOAL, GOAL_GROWTH = 16_384, 12, 8, 1024, 5, 100.0, 1.3
MANY, CALLS = 65_536, 10


def masked_flat(p_TD: Tensor, i_T: Tensor, codes_VD: Tensor) -> Tensor:
    """The best of all K·m codes of which only a vector's own m are let through; 256 vectors at a
    time.
    """
    owner_V, half_norms_V = torch.arange(len(codes_VD)) // SUB, codes_VD.square().sum(-1) / 2
    found = []
    for p_tD, i_t in zip(p_TD.split(256), i_T.split(256), strict=True):
        scores_tV = torch.addmm(half_norms_V, p_tD, codes_VD.T, alpha=-1)
        found.append(scores_tV.masked_fill_(owner_V != i_t[:, None], torch.inf).argmin(-1))
    return torch.cat(found) % SUB


def problem(num_semantic: int, num: int) -> tuple[SubCodebooks, Tensor, Tensor]:
    torch.manual_seed(num_semantic)
    return (
        SubCodebooks(num_semantic, SUB, DIM),
        torch.randn(num, DIM),
        torch.randint(num_semantic, (num,)),
    )


def main() -> None:
    torch.set_num_threads(1)
    books, p_TD, i_T = problem(SEMANTIC, NUM)
    codes_VD = books.codes.detach()

    def ours() -> None:
        for _ in range(CALLS):
            books.assign(p_TD, i_T)

    ours_s, theirs_s = in_turns(ours, lambda: masked_flat(p_TD, i_T, codes_VD), TURNS)
    ours_s /= CALLS
    quality = float((books.assign(p_TD, i_T) == masked_flat(p_TD, i_T, codes_VD)).float().mean())
    small, large = problem(1024, MANY), problem(4096, MANY)
    small_s, large_s = in_turns(
        lambda: small[0].assign(*small[1:]), lambda: large[0].assign(*large[1:]), 2 * TURNS + 1
    )
    ratio, growth = theirs_s / ours_s, large_s / small_s
    print(
        f"own rows {ours_s * 1e3:.2f} ms, masked flat search {theirs_s * 1e3:.0f} ms; K 1K to 4K: {growth:.2f}x"
    )
    result = {
        "goal": 6,
        "ratio": round(ratio, 1),
        "growth": round(growth, 3),
        "quality": quality,
        "met": bool(ratio >= GOAL and growth <= GOAL_GROWTH and quality >= 0.999),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
