"""Draw codes from logits: guidance, temperature, top-k, top-p, and seeds.

Axes: B images, R rows of the batch (B, or 2B with guidance), K codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from smalti.schema import Sampling


def guidance(logits_RK: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance ℓ_u + s (ℓ_c − ℓ_u): (B, K).

    Args:
        logits_RK: conditional rows first, then the unconditional ones; with `cfg` 1 only the
            conditional ones.
        cfg: s.
    """
    if cfg == 1.0:
        return logits_RK
    conditional_BK, unconditional_BK = logits_RK.chunk(2)
    return unconditional_BK + cfg * (conditional_BK - unconditional_BK)


def choose(logits_BK: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Draw one code per row: int64 (B,).

    Temperature, then top-k, then top-p, then the inverse of the distribution function at
    `uniform_B`. Temperature 0 takes the best code.
    """
    if sampling.temperature == 0:
        return logits_BK.argmax(-1)
    logits_BK = logits_BK / sampling.temperature
    if 0 < sampling.top_k < logits_BK.shape[1]:
        least_B1 = logits_BK.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < least_B1, -torch.inf)
    probabilities_BK = logits_BK.double().softmax(-1)
    if sampling.top_p < 1:
        probabilities_BK = _nucleus(probabilities_BK, sampling.top_p)
    sums_BK = probabilities_BK.cumsum(-1)
    thresholds_B1 = (uniform_B.double() * sums_BK[:, -1])[:, None]
    drawn_B = torch.searchsorted(sums_BK, thresholds_B1, right=True).squeeze(1)
    last_B = probabilities_BK.shape[1] - 1 - (probabilities_BK > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn_B, last_B)


def _nucleus(probabilities_BK: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of codes whose probabilities reach `top_p`.

    The best code is always kept.
    """
    sorted_BK, order_BK = probabilities_BK.sort(dim=-1, descending=True, stable=True)
    before_BK = sorted_BK.cumsum(-1) - sorted_BK
    kept_BK = sorted_BK * (before_BK < max(top_p, torch.finfo(torch.float64).tiny))
    return torch.zeros_like(probabilities_BK).scatter_(1, order_BK, kept_BK)


def sample_uniform(seeds: Sequence[int], tokens: int) -> Tensor:
    """Random numbers in [0, 1) per sample and token: float64 (B, tokens).

    A row depends on its own seed alone.
    """
    rows = [
        torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a run, in [0, 2⁶³).

    It is a hash, so that runs with neighbouring seeds share no sample.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big") >> 1


def seeds_of(seed: int | Sequence[int], count: int) -> list[int]:
    """The seeds of `count` samples: derived from one number, or as given.

    Raises:
        ValueError: if another number of seeds is given.
    """
    if isinstance(seed, int):
        return [sample_seed(seed, index) for index in range(count)]
    if len(seed) != count:
        raise ValueError(
            f"{len(seed)} seeds for {count} prompts; give one number, or one per prompt."
        )
    return list(seed)
