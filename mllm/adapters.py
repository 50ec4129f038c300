"""From code vectors to what the language model receives in place of an embedding row (SemHiTok, Dual-MLP).

Axes: N positions, C width of a code vector, H the language model's width.
The output depends on the code alone, never on its neighbours: that is what lets the export write it into embedding rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smalti.errors import ConfigError


class Adapter(nn.Module):
    """Base: standardises code vectors by the codebook's own mean and deviation, then `project`s them to H.

    Codebooks come at any scale (k-means centroids, unit vectors); the two buffers make the MLPs see about unit variance.
    """

    shift_C: Tensor
    scale_C: Tensor

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__()
        self.splits, self.hidden, self.out = tuple(splits), hidden, out
        self.register_buffer("shift_C", torch.zeros(sum(splits)))
        self.register_buffer("scale_C", torch.ones(sum(splits)))

    @torch.no_grad()
    def fit(self, codes_VC: Tensor) -> None:
        """Set the standardisation from the whole codebook: a mean for each column, one deviation for each split."""
        start = 0
        for width in self.splits:
            part = codes_VC[:, start : start + width].float()
            self.shift_C[start : start + width] = part.mean(0)
            spread = (part - part.mean(0)).pow(2).mean().sqrt().clamp_min(1e-6)
            self.scale_C[start : start + width] = 1 / spread
            start += width

    def forward(self, codes_NC: Tensor) -> Tensor:
        """(…, C) code vectors → (…, H)."""
        dtype = next(self.parameters()).dtype
        return self.project(((codes_NC - self.shift_C) * self.scale_C).to(dtype))

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
    """`concat(MLP_s(c_i), MLP_p(C_pix^i[j]))`: each part of the code vector fills its half of H (arXiv 2503.06764, §3.3)."""

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
    """One MLP over the whole code vector: the ablation's other side, and the one for codes of a single part."""

    def __init__(self, splits: Sequence[int], hidden: int, out: int) -> None:
        super().__init__(splits, hidden, out)
        self.whole = _mlp(sum(self.splits), hidden, out)

    def project(self, codes_NC: Tensor) -> Tensor:
        return self.whole(codes_NC)


ADAPTERS: dict[str, type[Adapter]] = {"dual": DualAdapter, "single": SingleAdapter}


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
