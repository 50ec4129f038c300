"""Pixel codebooks: one small codebook a semantic code (SGHC), and the flat one that does without semantics.

Axis letters: K semantic codes, M sub-codes of each (m), D width, T vectors (leading axes flattened), S samples a code.
Rows are Parameters trained by the codebook loss; they start as k-means of the encoder's vectors and are not restarted
afterwards: the start is what prevents dead rows, and a row moved behind the optimizer's back would be moved back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.tokenizers.kmeans import kmeans
from smalti.tokenizers.quantizers import nearest, straight_through

SAMPLES_PER_ROW = 32
"""Vectors a sub-code that its k-means looks at, at most."""
GROUP_VALUES = 1 << 24
"""Distances held at once while sub-codebooks are initialised."""


class SubQuantized(NamedTuple):
    """Straight-through vectors, int64 sub-codes j, scalar loss ‖sg(p) − e‖² + β‖p − sg(e)‖² (means over elements)."""

    q: Tensor
    ids: Tensor
    loss: Tensor


def vq_loss(p: Tensor, e: Tensor, beta: float) -> Tensor:
    """Codebook and commitment loss, in float32 (SemHiTok, arXiv 2503.06764)."""
    p, e = p.float(), e.float()
    return F.mse_loss(e, p.detach()) + beta * F.mse_loss(p, e.detach())


class SubCodebooks(nn.Module):
    """K codebooks of m rows: the semantic code picks the codebook, the nearest of its m rows is the pixel code."""

    def __init__(self, num_semantic: int, num_sub: int, dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.num_semantic, self.num_sub, self.dim, self.beta = num_semantic, num_sub, dim, beta
        self.codes = nn.Parameter(torch.randn(num_semantic * num_sub, dim) / dim**0.5)

    def assign(self, p: Tensor, i: Tensor) -> Tensor:
        """Nearest row of each vector's own sub-codebook, by gathering m rows: int64 (…) in [0, m); ties the lowest.

        p: (…, D); i: int64 (…), the semantic codes.
        """
        if p.shape[:-1] != i.shape or p.shape[-1] != self.dim:
            raise ValueError(f"vectors {tuple(p.shape)} and semantic codes {tuple(i.shape)}, expected width {self.dim}")
        with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
            rows = F.embedding(i, self.codes.float().view(self.num_semantic, -1))
            rows = rows.view(*i.shape, self.num_sub, self.dim)
            return (p.float().unsqueeze(-2) - rows).square_().sum(-1).argmin(-1)

    def forward(self, p_BND: Tensor, i_BN: Tensor) -> SubQuantized:
        """Quantize pixel vectors within the sub-codebooks of their semantic codes."""
        j_BN = self.assign(p_BND, i_BN)
        e_BND = F.embedding(i_BN * self.num_sub + j_BN, self.codes)
        return SubQuantized(straight_through(p_BND, e_BND.to(p_BND.dtype)), j_BN, vq_loss(p_BND, e_BND, self.beta))

    @torch.no_grad()
    def init_from(
        self, vectors_TD: Tensor, ids_T: Tensor, generator: torch.Generator | None = None, iterations: int = 10
    ) -> None:
        """Set every sub-codebook to the k-means of the vectors seen with its semantic code.

        A code seen with fewer than m vectors gets its vectors' mean (never seen: the mean of all) plus the m common
        deviations, that is the k-means of all vectors minus their code's mean; so its rows are distinct all the same.
        """
        vectors_TD, ids_T = vectors_TD.detach().float(), ids_T.flatten()
        if len(vectors_TD) != len(ids_T) or not len(ids_T):
            raise ValueError(f"{len(vectors_TD)} vectors with {len(ids_T)} semantic codes; at least one is needed")
        if not bool(torch.isfinite(vectors_TD).all()):
            raise ValueError("pixel vectors hold NaN or Inf; sub-codebooks cannot start from them")
        counts_K = torch.bincount(ids_T, minlength=self.num_semantic)
        sums_KD = vectors_TD.new_zeros(self.num_semantic, self.dim).index_add_(0, ids_T, vectors_TD)
        means_KD = torch.where(counts_K[:, None] > 0, sums_KD / counts_K.clamp(min=1)[:, None], vectors_TD.mean(0))
        shuffled = torch.randperm(len(ids_T), generator=generator).to(ids_T.device)
        sample = shuffled[: 1 << 16]
        deviations_MD = kmeans(vectors_TD[sample] - means_KD[ids_T[sample]], self.num_sub, iterations, generator)
        rows_KMD = means_KD[:, None] + deviations_MD
        rich = (counts_K >= self.num_sub).nonzero().flatten()
        by_code = shuffled[ids_T[shuffled].sort(stable=True).indices]
        starts_K = counts_K.cumsum(0) - counts_K
        samples = min(SAMPLES_PER_ROW * self.num_sub, int(counts_K.max()))
        step = max(1, GROUP_VALUES // (samples * self.num_sub * self.dim))
        for group in rich.split(step):
            held = torch.arange(samples, device=ids_T.device) < counts_K[group][:, None]
            places = (starts_K[group][:, None] + torch.arange(samples, device=ids_T.device)).clamp(max=len(ids_T) - 1)
            rows_KMD[group] = grouped_kmeans(vectors_TD[by_code[places]], held, self.num_sub, iterations)
        self.codes.copy_(rows_KMD.reshape(-1, self.dim))


def grouped_kmeans(x_GSD: Tensor, held_GS: Tensor, num: int, iterations: int) -> Tensor:
    """k-means of G small groups at once: (G, num, D). `held_GS` marks the real vectors; each group has ≥ num of them.

    Seeds: each group's first vector, then always the one farthest from the seeds so far (deterministic; the vectors
    come shuffled). An empty cluster moves to its group's worst-served vector.
    """
    far = torch.full(held_GS.shape, torch.inf, device=x_GSD.device).masked_fill(~held_GS, -1.0)
    group = torch.arange(len(x_GSD), device=x_GSD.device)
    seeds = []
    for k in range(num):
        pick_G = far.argmax(-1) if k else held_GS.int().argmax(-1)
        seeds.append(x_GSD[group, pick_G])
        far = torch.minimum(far, (x_GSD - seeds[-1][:, None]).square().sum(-1).masked_fill(~held_GS, -1.0))
    c_GMD = torch.stack(seeds, 1)
    for _ in range(iterations):
        distance_GSM = (x_GSD.unsqueeze(2) - c_GMD.unsqueeze(1)).square().sum(-1)
        best = distance_GSM.min(-1)
        ids = (best.indices + group[:, None] * num)[held_GS]
        counts = torch.bincount(ids, minlength=len(x_GSD) * num).view(len(x_GSD), num)
        sums = x_GSD.new_zeros(len(x_GSD) * num, x_GSD.shape[-1]).index_add_(0, ids, x_GSD[held_GS]).view_as(c_GMD)
        worst_G = best.values.masked_fill(~held_GS, -1.0).argmax(-1)
        c_GMD = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], c_GMD)
        first_empty = (counts == 0) & ((counts == 0).int().cumsum(-1) == 1)
        c_GMD = torch.where(first_empty[..., None], x_GSD[group, worst_G][:, None], c_GMD)
    return c_GMD


class FlatCodebook(nn.Module):
    """One codebook of `num_codes` pixel codes, searched whole: the tokenizer without semantic guidance."""

    def __init__(self, num_codes: int, dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.num_codes, self.dim, self.beta = num_codes, dim, beta
        self.codes = nn.Parameter(torch.randn(num_codes, dim) / dim**0.5)

    def assign(self, p: Tensor, i: Tensor | None = None) -> Tensor:
        """Nearest of all codes: int64 (…). `i` is not looked at."""
        return nearest(p, self.codes)

    def forward(self, p_BND: Tensor, i_BN: Tensor | None = None) -> SubQuantized:
        """Quantize pixel vectors; `i_BN` is not looked at."""
        j_BN = self.assign(p_BND)
        e_BND = F.embedding(j_BN, self.codes)
        return SubQuantized(straight_through(p_BND, e_BND.to(p_BND.dtype)), j_BN, vq_loss(p_BND, e_BND, self.beta))

    @torch.no_grad()
    def init_from(
        self,
        vectors_TD: Tensor,
        ids_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        iterations: int = 10,
    ) -> None:
        """Set the codes to the k-means of the vectors (at most 256 a code are looked at); `ids_T` is not."""
        vectors_TD = vectors_TD.detach().float()
        most = 256 * self.num_codes
        if len(vectors_TD) > most:
            chosen = torch.randperm(len(vectors_TD), generator=generator)[:most]
            vectors_TD = vectors_TD[chosen.to(vectors_TD.device)]
        self.codes.copy_(kmeans(vectors_TD, self.num_codes, iterations, generator))
