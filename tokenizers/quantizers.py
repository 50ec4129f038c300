"""Vector quantizers: EMA, vanilla and normalized codebooks.

Axis letters: B batch, N tokens per image, K codes, D code width, M = all leading axes flattened. No
collective runs in a `forward`: a quantizer returns `EMAStats`, and the caller passes `all_reduce`
to `update`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.tokenizers.flat_search import nearest

AllReduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """`all_reduce` of a single rank."""
    return x


def histogram(ids: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs: int64 (K,).

    Unlike `torch.bincount` and `unique`, whose shapes depend on values: so no GPU waits, and a
    planner can trace it on tensors without values.
    """
    ids_M = ids.flatten()
    return ids_M.new_zeros(num_codes).index_add_(0, ids_M, torch.ones_like(ids_M))


def presence(ids: Tensor, num_codes: int) -> Tensor:
    """Which codes occur: float32 (K,), 1 or 0; its sum is the number of different codes."""
    return torch.zeros(num_codes, device=ids.device).index_fill_(0, ids.flatten(), 1.0)


@dataclass(frozen=True)
class VQ:
    """Sizes and constants of a quantizer.

    Attributes:
        beta: weight of the commitment loss.
        decay: γ of the EMA.
        eps: Laplace smoothing of EMA counts.
        restart_below: EMA count below which a code restarts; 0 is off.
    """

    num_codes: int
    dim: int
    beta: float = 0.25
    decay: float = 0.99
    eps: float = 1e-5
    restart_below: float = 1.0


@dataclass
class EMAStats:
    """Statistics of a batch for an EMA update.

    Attributes:
        counts: vectors of each code, float32 (K,).
        sums: their sums, float32 (K, D).
        candidates: the vectors of the batch (M, D), to restart codes from.
    """

    counts: Tensor
    sums: Tensor
    candidates: Tensor

    @staticmethod
    def of(h_MD: Tensor, ids_M: Tensor, num_codes: int) -> EMAStats:
        """Statistics of vectors (M, D) and their codes, detached, without a one-hot matrix."""
        h_MD = h_MD.detach().float()
        counts_K = histogram(ids_M, num_codes).to(torch.float32)
        sums_KD = h_MD.new_zeros(num_codes, h_MD.shape[1]).index_add_(0, ids_M, h_MD)
        return EMAStats(counts_K, sums_KD, h_MD)

    @staticmethod
    def merge(parts: Sequence[EMAStats]) -> EMAStats:
        """Statistics of the micro batches of a step as those of one batch."""
        counts = torch.stack([p.counts for p in parts]).sum(0)
        sums = torch.stack([p.sums for p in parts]).sum(0)
        return EMAStats(counts, sums, torch.cat([p.candidates for p in parts]))


class Quantized(NamedTuple):
    """Output of a quantizer: straight-through vectors, int64 codes, scalar loss, EMA statistics."""

    q: Tensor
    ids: Tensor
    loss: Tensor
    stats: EMAStats | None


def straight_through(h: Tensor, q: Tensor) -> Tensor:
    """`q` in value, `h` in gradient."""
    return h + (q - h).detach()


class Float32Buffers(nn.Module):
    """A module whose `float32_buffers` stay float32 when it changes precision."""

    float32_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        kept = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after is not None and after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self


class Quantizer(nn.Module, ABC):
    """Interface of every entry of `QUANTIZERS`.

    The contract, tested for each entry (tests/tokenizers/test_quantizers.py):

    - After `set_codes(c)`, `effective_codes()` equals `representable(c)`.
    - `assign(effective_codes())` is 0, 1, …, K − 1 where those vectors are distinct.
    - `forward(h).q` is `effective_codes()[forward(h).ids]` in value, and `forward(h).ids` is
      `assign(h)`.
    - `effective_codes()` survives `state_dict` and `load_state_dict`.

    A start from k-means centroids depends on the first two: a quantizer that breaks them loses its
    start silently.
    """

    config: VQ

    @abstractmethod
    def set_codes(self, codes_KD: Tensor) -> None:
        """Start from codes (K, D).

        Raises:
            ValueError: for another shape, NaN or Inf.
        """

    @abstractmethod
    def effective_codes(self) -> Tensor:
        """The vectors that decoding uses: float32 (K, D)."""

    def representable(self, codes_KD: Tensor) -> Tensor:
        """What `set_codes(codes_KD)` can represent of these codes: float32 (K, D); by default all
        of it.
        """
        return codes_KD.float()

    @abstractmethod
    def assign(self, h: Tensor) -> Tensor:
        """Code of every vector (…, D): int64 (…) in [0, K)."""

    @abstractmethod
    def forward(self, h_BND: Tensor) -> Quantized:
        """Quantize vectors (B, N, D); `stats` is None unless `update` needs it."""

    def update(
        self,
        stats: EMAStats,
        all_reduce: AllReduce = identity,
        generator: torch.Generator | None = None,
        rank: int = 0,
    ) -> int:
        """Move the codes after the optimizer's step.

        Returns:
            Number of codes restarted; 0 for codebooks that only gradients move.
        """
        return 0


class EMAQuantizer(Float32Buffers, Quantizer):
    """Codebook of running means (VQ-VAE-2).

    `N ← γN + (1−γ)n; M ← γM + (1−γ)s; N̂ = ΣN·(N+ε)/(ΣN+Kε); c = M/N̂`, with n and s summed over
    all ranks. A code with N < `restart_below` restarts: M ← a random vector of the global batch, N
    ← 1. Before the first update N is set to the mean count per code of that batch (at least 1), so
    that an initialized codebook does not restart at once.
    """

    float32_buffers = ("codes", "counts", "sums")
    codes: Tensor
    counts: Tensor
    sums: Tensor
    num_updates: Tensor

    def __init__(self, config: VQ) -> None:
        super().__init__()
        self.config = config
        codes_KD = torch.randn(config.num_codes, config.dim) / config.dim**0.5
        self.register_buffer("codes", codes_KD)
        self.register_buffer("counts", torch.ones(config.num_codes))
        self.register_buffer("sums", codes_KD.clone())
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def set_codes(self, codes_KD: Tensor) -> None:
        """Start from these codes (K, D) with fresh statistics."""
        with torch.no_grad():
            self.codes.copy_(_checked_codes(codes_KD, self.config))
            self.counts.fill_(1.0)
            self.sums.copy_(self.codes)
            self.num_updates.zero_()

    def effective_codes(self) -> Tensor:
        """The vectors that decoding uses: float32 (K, D)."""
        return self.codes

    def assign(self, h: Tensor) -> Tensor:
        """Code of every vector (…, D): int64 (…)."""
        return nearest(h, self.codes)

    def forward(self, h_BND: Tensor) -> Quantized:
        """Quantize; loss is β·mean(‖h − sg(c)‖²) over elements, in float32."""
        ids = self.assign(h_BND)
        q = F.embedding(ids, self.codes)
        loss = self.config.beta * F.mse_loss(h_BND.float(), q)
        stats = None
        if self.training:
            stats = EMAStats.of(
                h_BND.reshape(-1, self.config.dim), ids.flatten(), self.config.num_codes
            )
        return Quantized(straight_through(h_BND, q.to(h_BND.dtype)), ids, loss, stats)

    @torch.no_grad()
    def update(
        self,
        stats: EMAStats,
        all_reduce: AllReduce = identity,
        generator: torch.Generator | None = None,
        rank: int = 0,
    ) -> int:
        """Move the codes after the optimizer's step.

        All ranks end with the same codebook, the one of a single rank with the whole batch.

        Args:
            all_reduce: returns the sum of a tensor over all ranks.
            generator: in the same state on all ranks; default: one seeded by the number of updates.
            rank: this rank.

        Returns:
            Number of codes restarted.

        Raises:
            FloatingPointError: for statistics with NaN or Inf.
            ValueError: for ranks that are not distinct, or no vectors.
        """
        counts_K = all_reduce(stats.counts.clone())
        sums_KD = all_reduce(stats.sums.clone())
        if not bool(torch.isfinite(sums_KD).all()):
            raise FloatingPointError(
                "EMA statistics hold NaN or Inf: the vectors of the quantizer diverged"
            )
        if self.num_updates == 0:
            self.counts.fill_(max(1.0, float(counts_K.sum()) / self.config.num_codes))
            self.sums.copy_(self.codes * self.counts[:, None])
        gamma = self.config.decay
        self.counts.mul_(gamma).add_(counts_K, alpha=1 - gamma)
        self.sums.mul_(gamma).add_(sums_KD, alpha=1 - gamma)
        dead = (self.counts < self.config.restart_below).nonzero().flatten()
        if len(dead):
            self.sums[dead] = self._draw(len(dead), stats.candidates, all_reduce, generator, rank)
            self.counts[dead] = 1.0
        total = self.counts.sum()
        smoothed_K = (
            total
            * (self.counts + self.config.eps)
            / (total + self.config.num_codes * self.config.eps)
        )
        self.codes.copy_(self.sums / smoothed_K[:, None])
        self.num_updates += 1
        return len(dead)

    def _draw(
        self,
        num: int,
        own_MD: Tensor,
        all_reduce: AllReduce,
        generator: torch.Generator | None,
        rank: int,
    ) -> Tensor:
        """`num` random vectors of the global batch, equal on all ranks: float32 (num, D)."""
        if generator is None:
            generator = torch.Generator().manual_seed(1_000_003 + int(self.num_updates))
        sizes = torch.zeros(
            int(all_reduce(own_MD.new_ones(1)).round()), dtype=torch.float64, device=own_MD.device
        )
        if not 0 <= rank < len(sizes):
            raise ValueError(f"rank is {rank}, expected 0 to {len(sizes) - 1}")
        sizes[rank] = len(own_MD)
        sizes = all_reduce(sizes).to(torch.int64)
        if sizes[rank] != len(own_MD):
            raise ValueError(
                f"{len(sizes)} ranks updated a codebook with the same rank {rank}: pass each its own"
            )
        total = int(sizes.sum())
        offset = int(sizes[:rank].sum())
        if total == 0:
            raise ValueError("EMA update without vectors")
        order = torch.randperm(total, generator=generator, device=generator.device)[:num]
        extra = torch.randint(
            total, (max(0, num - total),), generator=generator, device=generator.device
        )
        local = torch.cat([order, extra]).to(own_MD.device) - offset
        mine = (local >= 0) & (local < len(own_MD))
        drawn = own_MD.new_zeros(num, own_MD.shape[1])
        drawn[mine] = own_MD[local[mine]]
        return all_reduce(drawn)


class VanillaQuantizer(Quantizer):
    """Codebook trained by gradients, straight-through (VQ-VAE).

    The loss is mean(‖sg(h) − c‖²) + β·mean(‖h − sg(c)‖²).
    """

    normalised = False

    def __init__(self, config: VQ) -> None:
        super().__init__()
        self.config = config
        self.codes = nn.Parameter(torch.randn(config.num_codes, config.dim) / config.dim**0.5)

    def set_codes(self, codes_KD: Tensor) -> None:
        """Start from these codes (K, D)."""
        with torch.no_grad():
            self.codes.copy_(self._space(_checked_codes(codes_KD, self.config)))

    def _space(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1) if self.normalised else x.float()

    def effective_codes(self) -> Tensor:
        """The vectors that decoding uses: float32 (K, D); unit vectors for `norm`."""
        return self._space(self.codes)

    def representable(self, codes_KD: Tensor) -> Tensor:
        """The codes themselves: float32 (K, D); their directions for `norm`."""
        return self._space(codes_KD)

    def assign(self, h: Tensor) -> Tensor:
        """Code of every vector (…, D): int64 (…)."""
        return nearest(self._space(h), self.effective_codes())

    def forward(self, h_BND: Tensor) -> Quantized:
        """Quantize; the loss trains codes and vectors, and `stats` is None."""
        ids = self.assign(h_BND)
        h = self._space(h_BND)
        q = self._space(F.embedding(ids, self.codes))
        loss = F.mse_loss(q, h.detach()) + self.config.beta * F.mse_loss(h, q.detach())
        return Quantized(straight_through(h, q).to(h_BND.dtype), ids, loss, None)


class NormQuantizer(VanillaQuantizer):
    """`VanillaQuantizer` with l2-normalized vectors and codes."""

    normalised = True


def _checked_codes(codes_KD: Tensor, config: VQ) -> Tensor:
    if codes_KD.shape != (config.num_codes, config.dim):
        raise ValueError(
            f"codes have the shape {tuple(codes_KD.shape)}, expected {(config.num_codes, config.dim)}"
        )
    if not bool(torch.isfinite(codes_KD).all()):
        raise ValueError("codes hold NaN or Inf")
    return codes_KD


QUANTIZERS: dict[str, type[Quantizer]] = {
    "ema": EMAQuantizer,
    "vanilla": VanillaQuantizer,
    "norm": NormQuantizer,
}
"""By the name that `tokenizer.semantic.vq` takes. Each is made from a `VQ`."""
