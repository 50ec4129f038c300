"""Residual quantization with one EMA codebook (RQ-VAE, arXiv 2203.01941; DualToken, arXiv
2503.14324).

`r_0 = z; k_d = argmin ‖r_{d−1} − e_k‖; r_d = r_{d−1} − e_{k_d}; ẑ_d = Σ_{≤d} e`. Arithmetic is
float32 under any autocast. Axis letters: B batch, N tokens, R depth (codes per vector), D code
width, K codes, M vectors (leading axes flattened).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.tokenizers.flat_search import nearest
from smalti.tokenizers.kmeans import kmeans
from smalti.tokenizers.quantizers import (
    VQ,
    AllReduce,
    EMAQuantizer,
    EMAStats,
    Quantized,
    identity,
    straight_through,
)

SAMPLES_PER_CODE = 256
"""Most vectors per code in the k-means of an initialization."""


class ResidualQuantizer(nn.Module):
    """`depth` codes per vector, each the nearest to the residual of the codes before it.

    All depths share an EMA codebook, which a step updates once with the statistics of all depths. A
    dead code restarts at a random residual of the batch (z among them). `config.beta` weights the
    commitment loss.
    """

    def __init__(self, config: VQ, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.book = EMAQuantizer(config)

    @property
    def codes(self) -> Tensor:
        """The codebook: float32 (K, D)."""
        return self.book.codes

    @torch.no_grad()
    def assign(self, z_BND: Tensor) -> Tensor:
        """Codes of vectors (…, D): int64 (…, R)."""
        return self._quantize(z_BND)[0]

    def embed(self, ids_BNR: Tensor) -> Tensor:
        """Sum of the codes of each vector: float32 (…, D); of `ids[…, :d]` it is ẑ_d."""
        return F.embedding(ids_BNR, self.book.codes).sum(-2)

    def _quantize(self, z_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (…, R), sums ẑ_1 … ẑ_R and residuals r_0 … r_{R−1}, both float32 (…, R, D)."""
        rest_BND = z_BND.detach().float()
        sum_BND = torch.zeros_like(rest_BND)
        ids = []
        sums = []
        residuals = []
        for _ in range(self.depth):
            residuals.append(rest_BND)
            ids.append(self.book.assign(rest_BND))
            code_BND = F.embedding(ids[-1], self.book.codes)
            rest_BND = rest_BND - code_BND
            sum_BND = sum_BND + code_BND
            sums.append(sum_BND)
        return torch.stack(ids, -1), torch.stack(sums, -2), torch.stack(residuals, -2)

    def forward(self, z_BND: Tensor) -> Quantized:
        """Quantize to ẑ_R, straight-through.

        The loss is β·mean_d mean(‖z − sg(ẑ_d)‖²) over elements; statistics are returned in train
        mode.
        """
        ids_BNR, sums_BNRD, residuals_BNRD = self._quantize(z_BND)
        loss = self.book.config.beta * (z_BND.float().unsqueeze(-2) - sums_BNRD).square().mean()
        stats = None
        if self.training:
            dim = self.book.config.dim
            num_codes = self.book.config.num_codes
            stats = EMAStats.of(residuals_BNRD.reshape(-1, dim), ids_BNR.flatten(), num_codes)
        q_BND = sums_BNRD[..., -1, :].to(z_BND.dtype)
        return Quantized(straight_through(z_BND, q_BND), ids_BNR, loss, stats)

    def update(
        self,
        stats: EMAStats,
        all_reduce: AllReduce = identity,
        generator: torch.Generator | None = None,
        rank: int = 0,
    ) -> int:
        """Update the codebook after the optimizer's step (see `EMAQuantizer.update`)."""
        return self.book.update(stats, all_reduce, generator, rank)

    @torch.no_grad()
    def start_of(
        self, z_MD: Tensor, generator: torch.Generator | None = None, iterations: int = 10
    ) -> Tensor:
        """An initial codebook: float32 (K, D).

        Each depth gets an equal share of the codes: the k-means of the residuals of the depths
        before it, with at most `SAMPLES_PER_CODE` vectors per code.

        Raises:
            ValueError: for NaN or Inf.
        """
        rest_MD = z_MD.detach().float().reshape(-1, self.book.config.dim)
        num_codes = self.book.config.num_codes
        shares = [
            num_codes * (d + 1) // self.depth - num_codes * d // self.depth
            for d in range(self.depth)
        ]
        most = SAMPLES_PER_CODE * max(shares)
        if len(rest_MD) > most:
            rest_MD = rest_MD[
                torch.randperm(len(rest_MD), generator=generator)[:most].to(rest_MD.device)
            ]
        parts = []
        for share in filter(None, shares):
            codes_kD = kmeans(rest_MD, share, iterations, generator)
            rest_MD = rest_MD - F.embedding(nearest(rest_MD, codes_kD), codes_kD)
            parts.append(codes_kD)
        return torch.cat(parts)

    def init_from(self, z_MD: Tensor, generator: torch.Generator | None = None) -> None:
        """Initialize the codebook with `start_of`."""
        self.book.set_codes(self.start_of(z_MD, generator))
