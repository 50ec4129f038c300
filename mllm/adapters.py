"""From code vectors to what the language model receives in place of an embedding row (SemHiTok:
Dual-MLP; UniCode²: cascade).

Axes: N positions, V codes, C width of a code vector, H the language model's width. The output
depends on the code alone, never on its neighbours: that is what lets the export write it into
embedding rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.mllm.rows import Matrices, Whole, ranges

VARIANCE_FLOOR = 1e-4
"""Added to the codebook's variances, as a share of the largest: a direction that no code uses is
not blown up.
"""
FIT_ROWS = 65_536
"""Codes whose moments are taken at once, and that are whitened at once."""
FIT_NUMBERS = 1 << 26
"""Numbers of a codebook up to which its mean is taken in one piece."""


class Adapter(nn.Module):
    """Base: whitens code vectors by the codebook's own mean and covariance, then `project`s them to
    H.

    Codebooks come at any scale, and the codes that images use most lie close together (the tints of
    plain ground): along the few directions of most variance they look alike. Whitened, each part of
    a code vector has about unit variance in every direction, so the MLPs tell neighbours apart from
    the start.
    """

    shift_C: Tensor
    whiten_CC: Tensor
    own_codes = False
    """Whether the adapter holds the code vectors itself, and is called with codes in their place.
    """

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__()
        self.splits, self.hidden, self.out = tuple(splits), hidden, out
        self.register_buffer("shift_C", torch.zeros(sum(splits)))
        self.register_buffer("whiten_CC", torch.eye(sum(splits)))

    def hold(self, num_codes: int, matrices: Matrices) -> None:
        """Make room for the vectors of so many codes, where they are the adapter's own."""

    @torch.no_grad()
    def fit(self, codes_VC: Tensor, matrices: Matrices = Whole()) -> None:  # noqa: B008 (has no state)
        """Set shift and whitening (ZCA, each part of the code vector by itself) from the whole
        codebook.
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
        """(…, C) code vectors → (…, H)."""
        return self.of_vectors(codes_NC)

    def of_vectors(self, codes_NC: Tensor) -> Tensor:
        """(…, C) vectors of the visual tokenizer's codebook → (…, H)."""
        return self.project(self.whiten(codes_NC).to(next(self.parameters()).dtype))

    def whiten(self, codes_NC: Tensor) -> Tensor:
        """Code vectors as `project` takes them: float32 (…, C)."""
        with torch.autocast(
            codes_NC.device.type, enabled=False
        ):  # in bf16, rounding would drown the thin directions
            return (codes_NC.float() - self.shift_C.float()) @ self.whiten_CC.float()

    def project(self, codes_NC: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply the last layers, and so the output, by `factor`."""
        for module in self.modules():
            if isinstance(module, nn.Sequential):
                for parameter in module[-1].parameters():
                    parameter.mul_(factor)


class DualAdapter(Adapter):
    """`concat(MLP_s(c_i), MLP_p(C_pix^i[j]))`: each part of the code vector fills its half of H
    (arXiv 2503.06764, §3.3).
    """

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__(splits, hidden, out)
        if len(self.splits) != 2:
            raise ConfigError(
                f"mllm.adapter=dual needs code vectors of two parts, semantic and pixel, but this tokenizer's have "
                f"{len(self.splits)} ({self.splits}). Set mllm.adapter=single."
            )
        self.semantic = _mlp(self.splits[0], hidden, out // 2)
        self.pixel = _mlp(self.splits[1], hidden, out - out // 2)

    def project(self, codes_NC: Tensor) -> Tensor:
        semantic_NC, pixel_NC = codes_NC.split(self.splits, dim=-1)
        return torch.cat([self.semantic(semantic_NC), self.pixel(pixel_NC)], dim=-1)


class SingleAdapter(Adapter):
    """One MLP over the whole code vector: the ablation's other side, and the one for codes of a
    single part.
    """

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__(splits, hidden, out)
        self.whole = _mlp(sum(self.splits), hidden, out)

    def project(self, codes_NC: Tensor) -> Tensor:
        return self.whole(codes_NC)


class CascadeAdapter(SingleAdapter):
    """`MLP(c2_v)`: beside the tokenizer's frozen codebook, which gave the code v, a second one that
    is trained (UniCode²).

    C2 begins as the first codebook, whitened, and lies in these coordinates: an optimizer's step
    then means as much in every direction. A code's output still depends on the code alone.
    """

    own_codes = True

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__(splits, hidden, out)
        self.codes = nn.Embedding(1, sum(self.splits))

    def hold(self, num_codes: int, matrices: Matrices) -> None:
        like: Any = self.codes.weight
        self.codes.weight, self.codes.num_embeddings = matrices.empty(like, num_codes), num_codes

    @torch.no_grad()
    def fit(self, codes_VC: Tensor, matrices: Matrices = Whole()) -> None:  # noqa: B008 (has no state)
        """As `Adapter.fit`, and set C2 to the whitened codebook."""
        super().fit(codes_VC)
        rows = matrices.rows(self.codes.weight)
        for start, stop in ranges(0, len(codes_VC), rows.step or FIT_ROWS):
            rows.write(start, self.whiten(codes_VC[start:stop]))

    def forward(self, codes_N: Tensor) -> Tensor:
        """Codes, int64 (…) → (…, H)."""
        return self.project(self.codes(codes_N))


ADAPTERS: dict[str, type[Adapter]] = {
    "dual": DualAdapter,
    "single": SingleAdapter,
    "cascade": CascadeAdapter,
}


def fitting(name: str, splits: Sequence[int]) -> str:
    """The adapter that a recipe's name means: over code vectors of one part (no guidance) a dual
    one is a single one.
    """
    return "single" if name == "dual" and len(splits) == 1 else name


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def _moments(codes_VW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (W,) and covariance (W, W) of the rows, in float64; a large codebook is never held in
    float64.
    """
    parts = [codes_VW] if codes_VW.numel() <= FIT_NUMBERS else codes_VW.split(FIT_ROWS)
    mean_W = torch.stack(
        [part_VW.mean(0, dtype=torch.float64) * (len(part_VW) / len(codes_VW)) for part_VW in parts]
    ).sum(0)
    total_WW = mean_W.new_zeros(len(mean_W), len(mean_W))
    for part_VW in codes_VW.split(FIT_ROWS):
        centred_VW = part_VW.double() - mean_W
        total_WW += centred_VW.T @ centred_VW
    return mean_W, total_WW / len(codes_VW)
