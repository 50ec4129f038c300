"""Adapters map code vectors to the language model's input width.

An adapter's output takes the place of an embedding row (SemHiTok: Dual-MLP; UniCode²: cascade). It
depends on the code alone, never on its neighbours: so the export can write it into embedding rows.

Axes: N positions, V codes, C width of a code vector, W width of one part of it, H the language
model's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.mllm.rows import Matrices, WholeMatrices, ranges

VARIANCE_FLOOR = 1e-4
"""Added to the codebook's variances, as a share of the largest.

It limits how much a direction that no code uses is scaled up.
"""
FIT_ROWS = 65_536
"""Codes per batch when moments are taken and when the codebook is whitened."""
FIT_NUMBERS = 1 << 26
"""Largest codebook, in numbers, whose mean is computed in one batch."""


class Adapter(nn.Module, ABC):
    """Base class: whitens code vectors, then maps them to H with `project`.

    Codebooks come at any scale, and the codes that images use most lie close together (the tints of
    plain ground): along the few directions of most variance they hardly differ. Whitened by the
    codebook's own mean and covariance, each part of a code vector has about unit variance in every
    direction, so the MLPs separate neighbours from the start.

    Args:
        splits: widths of the parts of a code vector; their sum is C.
        hidden: width of the MLPs' hidden layer.
        out: H.
    """

    shift_C: Tensor
    whiten_CC: Tensor
    own_codes = False
    """Whether the adapter holds the code vectors itself; `forward` then takes codes."""

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__()
        self.splits = tuple(splits)
        self.hidden = hidden
        self.out = out
        self.register_buffer("shift_C", torch.zeros(sum(splits)))
        self.register_buffer("whiten_CC", torch.eye(sum(splits)))

    @abstractmethod
    def project(self, codes_NC: Tensor) -> Tensor:
        """Map whitened vectors (…, C) to (…, H)."""

    def allocate(self, num_codes: int, matrices: Matrices) -> None:
        """Allocate vectors for `num_codes` codes, if `own_codes`."""

    @torch.no_grad()
    def fit(self, codes_VC: Tensor, matrices: Matrices = WholeMatrices()) -> None:  # noqa: B008 (has no state)
        """Set shift and whitening from the whole codebook.

        Each part of the code vector is whitened by itself (ZCA).
        """
        self.whiten_CC.zero_()
        start = 0
        for width in self.splits:
            place = slice(start, start + width)
            mean_W, covariance_WW = _moments(codes_VC[:, place])
            values_W, vectors_WW = torch.linalg.eigh(covariance_WW)
            floor = (values_W.max() * VARIANCE_FLOOR).clamp_min(1e-12)
            self.shift_C[place] = mean_W.to(self.shift_C)
            block_WW = (vectors_WW * (values_W.clamp_min(0) + floor).rsqrt()) @ vectors_WW.T
            self.whiten_CC[place, place] = block_WW.to(self.whiten_CC)
            start += width

    def forward(self, codes_NC: Tensor) -> Tensor:
        """Map code vectors (…, C) to (…, H)."""
        return self.from_vectors(codes_NC)

    def from_vectors(self, codes_NC: Tensor) -> Tensor:
        """Map vectors (…, C) of the visual tokenizer's codebook to (…, H)."""
        return self.project(self.whiten(codes_NC).to(next(self.parameters()).dtype))

    def whiten(self, codes_NC: Tensor) -> Tensor:
        """Whitened code vectors, as `project` takes them: float32 (…, C)."""
        # in bf16, rounding would hide the directions of small variance
        with torch.autocast(codes_NC.device.type, enabled=False):
            return (codes_NC.float() - self.shift_C.float()) @ self.whiten_CC.float()

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply the last layers, and so the output, by `factor`."""
        for module in self.modules():
            if isinstance(module, nn.Sequential):
                for parameter in module[-1].parameters():
                    parameter.mul_(factor)


class DualAdapter(Adapter):
    """`concat(MLP_s(c_i), MLP_p(C_pix^i[j]))` (arXiv 2503.06764, §3.3).

    Each of the two parts of the code vector fills one half of H.

    Raises:
        ConfigError: if code vectors do not have two parts.
    """

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__(splits, hidden, out)
        if len(self.splits) != 2:
            raise ConfigError(
                "mllm.adapter=dual needs code vectors of two parts, semantic and pixel, but this "
                f"tokenizer's have {len(self.splits)} ({self.splits}). Set mllm.adapter=single."
            )
        self.semantic = _mlp(self.splits[0], hidden, out // 2)
        self.pixel = _mlp(self.splits[1], hidden, out - out // 2)

    def project(self, codes_NC: Tensor) -> Tensor:
        semantic_NC, pixel_NC = codes_NC.split(self.splits, dim=-1)
        return torch.cat([self.semantic(semantic_NC), self.pixel(pixel_NC)], dim=-1)


class SingleAdapter(Adapter):
    """One MLP over the whole code vector.

    The ablation's counterpart of `DualAdapter`, and the adapter for codes of one part.
    """

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__(splits, hidden, out)
        self.whole = _mlp(sum(self.splits), hidden, out)

    def project(self, codes_NC: Tensor) -> Tensor:
        return self.whole(codes_NC)


class CascadeAdapter(SingleAdapter):
    """`MLP(c2_v)` over a second, trained codebook (UniCode²).

    The tokenizer's frozen codebook gave the code v; c2_v is row v of a second codebook C2, which is
    trained. C2 starts as the whitened first codebook and stays in these coordinates: an optimizer
    step then means as much in every direction. A code's output still depends on the code alone.
    """

    own_codes = True

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__(splits, hidden, out)
        self.codes = nn.Embedding(1, sum(self.splits))

    def allocate(self, num_codes: int, matrices: Matrices) -> None:
        weight = self.codes.get_parameter("weight")
        self.codes.weight = matrices.empty(weight, num_codes)
        self.codes.num_embeddings = num_codes

    @torch.no_grad()
    def fit(self, codes_VC: Tensor, matrices: Matrices = WholeMatrices()) -> None:  # noqa: B008 (has no state)
        """Fit the whitening (`Adapter.fit`) and set C2 to the whitened codebook."""
        super().fit(codes_VC)
        rows = matrices.rows(self.codes.weight)
        for start, stop in ranges(0, len(codes_VC), rows.step or FIT_ROWS):
            rows.write(start, self.whiten(codes_VC[start:stop]))

    def forward(self, codes_N: Tensor) -> Tensor:
        """Map codes, int64 (…), to (…, H)."""
        return self.project(self.codes(codes_N))


ADAPTERS: dict[str, type[Adapter]] = {
    "dual": DualAdapter,
    "single": SingleAdapter,
    "cascade": CascadeAdapter,
}


def fitting(name: str, splits: Sequence[int]) -> str:
    """The adapter to build for a recipe's `mllm.adapter`.

    A dual adapter over code vectors of one part (no guidance) is a single one.
    """
    return "single" if name == "dual" and len(splits) == 1 else name


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def _moments(codes_VW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (W,) and covariance (W, W) of the rows, float64.

    A large codebook is never held in float64 as a whole.
    """
    batches = [codes_VW] if codes_VW.numel() <= FIT_NUMBERS else codes_VW.split(FIT_ROWS)
    shares = [
        batch_VW.mean(0, dtype=torch.float64) * (len(batch_VW) / len(codes_VW))
        for batch_VW in batches
    ]
    mean_W = torch.stack(shares).sum(0)
    total_WW = mean_W.new_zeros(len(mean_W), len(mean_W))
    for batch_VW in codes_VW.split(FIT_ROWS):
        centred_VW = batch_VW.double() - mean_W
        total_WW += centred_VW.T @ centred_VW
    return mean_W, total_WW / len(codes_VW)
