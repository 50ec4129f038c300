"""Triton kernel for nearest codes: bf16 products whose scores are never stored.

Axis letters: N vectors, K codes, C their width, B candidates per vector. A tile holds every
`num_tiles`-th code: similar codes, which k-means leaves next to each other, are then in different
tiles.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]  # comes with CUDA builds of torch
import triton.language as tl  # pyright: ignore[reportMissingImports]  # comes with CUDA builds of torch
from torch import Tensor

ROWS = 128
TILE = 256
STEP = 64
KEPT = 2
DEVICES = ((8, 0), (9, 0))
"""Compute capabilities whose shared memory holds three stages of a tile's inputs: A100, H100 and
H200.
"""


def candidates(low_NC: Tensor, low_KC: Tensor, half_norms_K: Tensor, num: int) -> Tensor:
    """The best `num` codes among the best `KEPT` of each tile by ‖c‖²/2 − x·c.

    N · K / 128 scores and ids are held at once.

    Args:
        low_NC, low_KC: vectors and codes, bfloat16, contiguous.
        half_norms_K: ‖c‖²/2, float32.

    Returns:
        Codes, lowest id first: int64 (N, B), B at most `num`.
    """
    rows, (codes, width) = len(low_NC), low_KC.shape
    tiles = triton.cdiv(codes, TILE)
    scores = torch.empty(rows, tiles * KEPT, device=low_NC.device)
    ids = torch.empty_like(scores, dtype=torch.int32)
    grid = (triton.cdiv(rows, ROWS) * tiles,)
    _best_of_tiles[grid](
        low_NC, low_KC, half_norms_K, scores, ids, rows, codes, width, tiles,
        ROWS=ROWS, TILE=TILE, STEP=STEP, KEPT=KEPT, EVEN=width % STEP == 0, num_warps=8, num_stages=3,
    )  # fmt: skip
    place = scores.topk(min(num, tiles * KEPT), largest=False, sorted=False).indices
    return ids.gather(1, place).sort(-1).values.long()


@triton.jit
def _best_of_tiles(
    x_ptr, codes_ptr, half_norms_ptr, scores_ptr, ids_ptr, num_x, num_codes, width, num_tiles,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, KEPT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program: some vectors against one tile.

    Consecutive programs share a tile, which is then read once.
    """
    blocks = tl.cdiv(num_x, ROWS)
    tile = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    offsets = tl.arange(0, TILE)
    steps = tl.arange(0, STEP)
    mine = tile + num_tiles * offsets
    x_ptrs = x_ptr + (rows % num_x).to(tl.int64)[:, None] * width + steps[None, :]
    code_ptrs = codes_ptr + (mine % num_codes).to(tl.int64)[None, :] * width + steps[:, None]
    sums = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, width, STEP):
        if EVEN:
            x = tl.load(x_ptrs)
            codes = tl.load(code_ptrs)
        else:
            inside = steps < width - start
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            codes = tl.load(code_ptrs, mask=inside[:, None], other=0.0)
        sums = tl.dot(x, codes, sums)
        x_ptrs += STEP
        code_ptrs += STEP
    half_norms = tl.load(half_norms_ptr + mine, mask=mine < num_codes, other=float("inf"))
    scores = half_norms[None, :] - sums
    out = rows.to(tl.int64) * (num_tiles * KEPT) + tile * KEPT
    for kept in tl.static_range(KEPT):
        place = tl.argmin(scores, axis=1)
        tl.store(scores_ptr + out + kept, tl.min(scores, axis=1), mask=rows < num_x)
        tl.store(
            ids_ptr + out + kept,
            tl.minimum(tile + num_tiles * place, num_codes - 1),
            mask=rows < num_x,
        )
        scores = tl.where(offsets[None, :] == place[:, None], float("inf"), scores)
