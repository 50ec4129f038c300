"""Search for the nearest of some codes, among all of them, in blocks of bounded memory.

Axis letters: K codes, D code width, M = all leading axes flattened. For a search among part of the
codes see `code_index`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCRATCH_SCORES = 1 << 22
"""Scores held at once by a search: 16 MiB in float32."""
CODE_BLOCK = 1 << 12
"""Codes compared at once.

It leaves room for 1,024 vectors: a GEMM of 64 vectors with 65,536 codes takes 1.6 times as long.
"""


def search(z_MD: Tensor, codes_KD: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Closest code of every vector, and its squared distance.

    GEMM form, ‖z‖² − 2(z·c − ‖c‖²/2), in blocks of at most `SCRATCH_SCORES` scores, in float32
    under any autocast.

    Args:
        z_MD: vectors.
        codes_KD: codes, K >= 1.
        chunk: vectors per block; default: as many as fit.

    Returns:
        Codes, int64 (M,) in [0, K), ties take the lowest; squared distances, float32 (M,).

    Raises:
        ValueError: for shapes that do not match, or no codes.
    """
    if z_MD.ndim != 2 or codes_KD.ndim != 2 or z_MD.shape[1] != codes_KD.shape[1]:
        raise ValueError(
            f"search expects (M, D) and (K, D), found {tuple(z_MD.shape)} and {tuple(codes_KD.shape)}"
        )
    if not len(codes_KD):
        raise ValueError("search among 0 codes")
    with torch.no_grad(), torch.autocast(z_MD.device.type, enabled=False):
        z_MD = z_MD.float()
        codes_KD = codes_KD.float()
        half_norms_K = squared_norms(codes_KD) / 2
        rows = chunk or max(1, SCRATCH_SCORES // min(len(codes_KD), CODE_BLOCK))
        ids_M = torch.empty(len(z_MD), dtype=torch.int64, device=z_MD.device)
        scores_M = torch.empty(len(z_MD), dtype=torch.float32, device=z_MD.device)
        for start in range(0, len(z_MD), rows):
            part = slice(start, start + rows)
            scores_M[part], ids_M[part] = best_score(z_MD[part], codes_KD, half_norms_K)
        return ids_M, (2 * scores_M + squared_norms(z_MD)).clamp_(min=0)


def squared_norms(x_MD: Tensor) -> Tensor:
    """‖x‖² of every row, without a copy of the matrix: (M,)."""
    return torch.linalg.vector_norm(x_MD, dim=-1).square_()


def best_score(z_MD: Tensor, codes_KD: Tensor, half_norms_K: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest ‖c‖²/2 − z·c of every row, and its code."""
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(codes_KD), CODE_BLOCK):
        block = slice(start, start + CODE_BLOCK)
        found = torch.addmm(half_norms_K[block], z_MD, codes_KD[block].T, alpha=-1).min(-1)
        score_M = found.values
        id_M = found.indices + start
        if best is not None:
            closer_M = score_M < best[0]
            score_M = torch.where(closer_M, score_M, best[0])
            id_M = torch.where(closer_M, id_M, best[1])
        best = score_M, id_M
    assert best is not None
    return best


def nearest(z_D: Tensor, codes_KD: Tensor, chunk: int | None = None) -> Tensor:
    """Index of the closest code (squared L2) of vectors (…, D): int64 (…) in [0, K); ties take the
    lowest.
    """
    return search(z_D.reshape(-1, z_D.shape[-1]), codes_KD, chunk)[0].view(z_D.shape[:-1])
