"""The head that predicts a place's codes of one codebook, depth by depth.

Axes: N places, R depth, d depths known so far, K codes, W width of a code, H width of the language
model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.mllm.losses import LossHead
from smalti.schema import DepthHeads
from smalti.tokenizers.vit import Transformer, init_linear


class DepthHead(nn.Module):
    """Predicts the codes of one codebook at a place.

    A causal transformer over R positions: the first holds the language model's hidden state, the
    d-th the sum of the vectors of the codes before it. Each position has its own classifier.

    Args:
        size: layers, heads and MLP ratio of the transformer.
        hidden: H.
        code_width: W.
        num_codes: K.
        depth: R.

    Raises:
        ConfigError: if `size.heads` does not divide H.
    """

    def __init__(
        self, size: DepthHeads, hidden: int, code_width: int, num_codes: int, depth: int
    ) -> None:
        super().__init__()
        if hidden % size.heads:
            raise ConfigError(
                f"mllm.depth_heads.heads={size.heads} does not divide the language model's width "
                f"of {hidden}; set a divisor."
            )
        self.code_in = nn.Linear(code_width, hidden)
        self.places = nn.Parameter(torch.randn(depth, hidden) * 0.02)
        self.body = Transformer(hidden, size.layers, size.heads, size.mlp_ratio, causal=True)
        self.classifiers = nn.ModuleList(
            LossHead(hidden, num_codes, bias=False) for _ in range(depth)
        )
        for linear in (self.code_in, *self.classifiers):
            init_linear(linear)

    def outputs(self, hidden_NH: Tensor, sums_NdW: Tensor) -> Tensor:
        """Outputs of the first d + 1 depths, from the sums of the codes so far: (N, d + 1, H)."""
        sums_NdH = self.code_in(sums_NdW.to(self.code_in.weight.dtype))
        x_NdH = torch.cat([hidden_NH[:, None], sums_NdH.to(hidden_NH.dtype)], 1)
        return self.body(x_NdH + self.places[: x_NdH.shape[1]].to(x_NdH.dtype))

    def forward(
        self,
        hidden_NH: Tensor,
        sums_NRW: Tensor,
        codes_NR: Tensor | None = None,
        weights_N: Tensor | None = None,
        chunk: int = 4096,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Loss of the given codes, or logits of the next code.

        Args:
            hidden_NH: hidden states before the places.
            sums_NRW: sums of the vectors of the codes so far; without codes (N, d, W), d ≥ 0.
            codes_NR: the codes to predict; IGNORE where nothing is predicted.
            weights_N: one factor per place (default 1).
            chunk: places whose logits exist at once.

        Returns:
            With codes: Σ weights · losses, differentiable, and the losses float32 (N, R). Without:
            logits (N, K) of the code after the given sums.
        """
        if codes_NR is None:
            return self.classifiers[sums_NRW.shape[1]](self.outputs(hidden_NH, sums_NRW)[:, -1])
        out_NRH = self.outputs(hidden_NH, sums_NRW[:, :-1])
        totals: list[Tensor] = []
        losses: list[Tensor] = []
        for d, classifier in enumerate(self.classifiers):
            total, losses_N, _ = classifier(out_NRH[:, d], codes_NR[:, d], weights_N, chunk)
            totals.append(total)
            losses.append(losses_N)
        return torch.stack(totals).sum(), torch.stack(losses, 1)
