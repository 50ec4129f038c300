"""Pixel codebooks: a small one per semantic code (SGHC), and a flat one.

Axis letters: K semantic codes, M sub-codes of each (m), D width, T vectors (leading axes
flattened), S samples per code. Rows are Parameters trained by the codebook loss. They are
initialized with k-means of the encoder's vectors, which prevents dead rows, and not restarted: the
optimizer's moments would undo a restart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.tokenizers.flat_search import nearest
from smalti.tokenizers.kmeans import kmeans
from smalti.tokenizers.quantizers import straight_through

SAMPLES_PER_ROW = 32
"""Most vectors per sub-code in its k-means."""
GROUP_VALUES = 1 << 24
"""Distances held at once while sub-codebooks are initialized."""


def flatten_codes(i: Tensor, j: Tensor, num_sub: int) -> Tensor:
    """Flat codes t = i·m + j."""
    return i * num_sub + j


def split_codes(t: Tensor, num_sub: int) -> tuple[Tensor, Tensor]:
    """Semantic codes t // m and sub-codes t mod m."""
    return t // num_sub, t % num_sub


class SubQuantized(NamedTuple):
    """Output of a pixel codebook.

    Attributes:
        q: vectors, straight-through.
        ids: sub-codes j, int64.
        loss: ‖sg(p) − e‖² + β‖p − sg(e)‖² (means over elements), float32 scalar.
    """

    q: Tensor
    ids: Tensor
    loss: Tensor


def vq_loss(p: Tensor, e: Tensor, beta: float) -> Tensor:
    """Codebook and commitment loss, in float32 (SemHiTok, arXiv 2503.06764)."""
    p = p.float()
    e = e.float()
    return F.mse_loss(e, p.detach()) + beta * F.mse_loss(p, e.detach())


class SubCodebooks(nn.Module):
    """K codebooks of m rows.

    The semantic code selects the codebook; the nearest of its m rows is the pixel code.
    """

    def __init__(self, num_semantic: int, num_sub: int, dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.num_semantic = num_semantic
        self.num_sub = num_sub
        self.dim = dim
        self.beta = beta
        self.codes = nn.Parameter(torch.randn(num_semantic * num_sub, dim) / dim**0.5)

    def assign(self, p: Tensor, i: Tensor) -> Tensor:
        """Nearest row of each vector's sub-codebook: int64 (…) in [0, m); ties take the lowest.

        m rows per vector are gathered; K·m distances are never computed.

        Args:
            p: vectors (…, D).
            i: semantic codes, int64 (…).

        Raises:
            ValueError: for shapes that do not match.
        """
        if p.shape[:-1] != i.shape or p.shape[-1] != self.dim:
            raise ValueError(
                f"vectors {tuple(p.shape)} and semantic codes {tuple(i.shape)}, expected width {self.dim}"
            )
        with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
            rows = F.embedding(i, self.codes.float().view(self.num_semantic, -1))
            rows = rows.view(*i.shape, self.num_sub, self.dim)
            return (p.float().unsqueeze(-2) - rows).square_().sum(-1).argmin(-1)

    def forward(self, p_BND: Tensor, i_BN: Tensor) -> SubQuantized:
        """Quantize pixel vectors within the sub-codebooks of their semantic codes."""
        j_BN = self.assign(p_BND, i_BN)
        e_BND = F.embedding(i_BN * self.num_sub + j_BN, self.codes)
        return SubQuantized(
            straight_through(p_BND, e_BND.to(p_BND.dtype)), j_BN, vq_loss(p_BND, e_BND, self.beta)
        )

    def _means(self, vectors_TD: Tensor, ids_T: Tensor, counts_K: Tensor) -> Tensor:
        """Mean of each semantic code's vectors, of all vectors where it has none: (K, D)."""
        sums_KD = vectors_TD.new_zeros(self.num_semantic, self.dim).index_add_(0, ids_T, vectors_TD)
        own_KD = sums_KD / counts_K.clamp(min=1)[:, None]
        return torch.where(counts_K[:, None] > 0, own_KD, vectors_TD.mean(0))

    @torch.no_grad()
    def init_from(
        self,
        vectors_TD: Tensor,
        ids_T: Tensor,
        generator: torch.Generator | None = None,
        iterations: int = 10,
    ) -> None:
        """Initialize every sub-codebook with k-means of its semantic code's vectors.

        A code with fewer than m vectors gets their mean (the mean of all vectors if it has none)
        plus m common deviations: the k-means of all vectors minus the mean of their code. Its rows
        are then distinct too.

        Args:
            vectors_TD: pixel vectors.
            ids_T: semantic code of each vector.

        Raises:
            ValueError: for no vectors, unequal lengths, NaN or Inf.
        """
        vectors_TD = vectors_TD.detach().float()
        ids_T = ids_T.flatten()
        if len(vectors_TD) != len(ids_T) or not len(ids_T):
            raise ValueError(
                f"found {len(vectors_TD)} vectors and {len(ids_T)} semantic codes, expected equally many, at least one"
            )
        if not bool(torch.isfinite(vectors_TD).all()):
            raise ValueError("pixel vectors hold NaN or Inf: sub-codebooks cannot be initialized")
        counts_K = torch.bincount(ids_T, minlength=self.num_semantic)
        shuffled = torch.randperm(len(ids_T), generator=generator).to(ids_T.device)
        sample = shuffled[: 1 << 16]
        means_KD = self._means(vectors_TD, ids_T, counts_K)
        deviations_MD = kmeans(
            vectors_TD[sample] - means_KD[ids_T[sample]], self.num_sub, iterations, generator
        )
        rows_KMD = means_KD[:, None] + deviations_MD
        rich = (counts_K >= self.num_sub).nonzero().flatten()
        by_code = shuffled[ids_T[shuffled].sort(stable=True).indices]
        starts_K = counts_K.cumsum(0) - counts_K
        samples = min(SAMPLES_PER_ROW * self.num_sub, int(counts_K.max()))
        step = max(1, GROUP_VALUES // (samples * self.num_sub * self.dim))
        for group in rich.split(step):
            held = torch.arange(samples, device=ids_T.device) < counts_K[group][:, None]
            places = (starts_K[group][:, None] + torch.arange(samples, device=ids_T.device)).clamp(
                max=len(ids_T) - 1
            )
            rows_KMD[group] = grouped_kmeans(
                vectors_TD[by_code[places]], held, self.num_sub, iterations
            )
        self.codes.copy_(rows_KMD.reshape(-1, self.dim))


def grouped_kmeans(x_GSD: Tensor, held_GS: Tensor, num: int, iterations: int) -> Tensor:
    """k-means of G small groups at once: (G, num, D).

    Seeds are a group's first vector, then repeatedly the vector farthest from the seeds so far. An
    empty cluster moves to the vector of its group with the largest distance.

    Args:
        x_GSD: shuffled vectors, padded.
        held_GS: bool, False for padding; each group has at least `num` vectors.
    """
    far = torch.full(held_GS.shape, torch.inf, device=x_GSD.device).masked_fill(~held_GS, -1.0)
    group = torch.arange(len(x_GSD), device=x_GSD.device)
    seeds = []
    for k in range(num):
        pick_G = far.argmax(-1) if k else held_GS.int().argmax(-1)
        seeds.append(x_GSD[group, pick_G])
        far = torch.minimum(
            far, (x_GSD - seeds[-1][:, None]).square().sum(-1).masked_fill(~held_GS, -1.0)
        )
    c_GMD = torch.stack(seeds, 1)
    for _ in range(iterations):
        distance_GSM = (x_GSD.unsqueeze(2) - c_GMD.unsqueeze(1)).square().sum(-1)
        best = distance_GSM.min(-1)
        ids = (best.indices + group[:, None] * num)[held_GS]
        counts = torch.bincount(ids, minlength=len(x_GSD) * num).view(len(x_GSD), num)
        sums = (
            x_GSD.new_zeros(len(x_GSD) * num, x_GSD.shape[-1])
            .index_add_(0, ids, x_GSD[held_GS])
            .view_as(c_GMD)
        )
        worst_G = best.values.masked_fill(~held_GS, -1.0).argmax(-1)
        c_GMD = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], c_GMD)
        first_empty = (counts == 0) & ((counts == 0).int().cumsum(-1) == 1)
        c_GMD = torch.where(first_empty[..., None], x_GSD[group, worst_G][:, None], c_GMD)
    return c_GMD


class FlatCodebook(nn.Module):
    """One codebook of `num_codes` pixel codes, for a tokenizer without guidance."""

    def __init__(self, num_codes: int, dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.dim = dim
        self.beta = beta
        self.codes = nn.Parameter(torch.randn(num_codes, dim) / dim**0.5)

    def assign(self, p: Tensor, i: Tensor | None = None) -> Tensor:
        """Nearest of all codes: int64 (…); `i` is ignored."""
        return nearest(p, self.codes)

    def forward(self, p_BND: Tensor, i_BN: Tensor | None = None) -> SubQuantized:
        """Quantize pixel vectors; `i_BN` is ignored."""
        j_BN = self.assign(p_BND)
        e_BND = F.embedding(j_BN, self.codes)
        return SubQuantized(
            straight_through(p_BND, e_BND.to(p_BND.dtype)), j_BN, vq_loss(p_BND, e_BND, self.beta)
        )

    @torch.no_grad()
    def init_from(
        self,
        vectors_TD: Tensor,
        ids_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        iterations: int = 10,
    ) -> None:
        """Initialize the codes with k-means of at most 256 vectors per code; `ids_T` is ignored."""
        vectors_TD = vectors_TD.detach().float()
        most = 256 * self.num_codes
        if len(vectors_TD) > most:
            chosen = torch.randperm(len(vectors_TD), generator=generator)[:most]
            vectors_TD = vectors_TD[chosen.to(vectors_TD.device)]
        self.codes.copy_(kmeans(vectors_TD, self.num_codes, iterations, generator))
