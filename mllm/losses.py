"""Cross entropy over a large vocabulary that never holds all logits.

Axes: N positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IGNORE = -100


class ChunkedLoss(NamedTuple):
    """`total` = Σ weights · loss, differentiable; the others, one a position (0 and False where ignored), are not."""

    total: Tensor
    losses_N: Tensor
    correct_N: Tensor


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk: int,
    *,
    bias_V: Tensor | None = None,
    weights_N: Tensor | None = None,
) -> ChunkedLoss:
    """Weighted sum of next-token losses, `chunk` positions at a time: at most chunk × V logits exist at once.

    labels_N: int64, IGNORE (−100) where nothing is predicted; weights_N: one factor a position (default 1). Losses are
    float32. The gradients of hidden, weight and bias are made in the forward pass, while a chunk's logits are there (three
    products in all, as with full logits), summed in float32 and returned in their tensors' own dtypes. So `backward` can run
    once only. A label outside [0, V) raises IndexError.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    valid_N = labels_N != IGNORE
    if bool((valid_N & ((labels_N < 0) | (labels_N >= weight_VD.shape[0]))).any()):
        raise IndexError(f"a label lies outside [0, {weight_VD.shape[0]})")
    if weights_N is None:
        weights_N = torch.ones_like(labels_N, dtype=torch.float32)
    return ChunkedLoss(*_ChunkedCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N, weights_N, chunk))


class LossHead(nn.Linear):
    """A language model's output head that can also compute its own loss: `head(hidden)` gives logits as before.

    With labels the loss is made inside this module's forward, so whatever gathers a module's weight around its forward and
    backward (DeepSpeed ZeRO-3, FSDP) has it in place, without this file knowing of it.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, labels_N: Tensor | None = None, weights_N: Tensor | None = None, chunk: int = 4096
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits (…, V); or, with labels, the three parts of a ChunkedLoss as a plain tuple (input then is (N, D))."""
        if labels_N is None:
            return super().forward(input)
        return tuple(chunked_cross_entropy(input, self.weight, labels_N, chunk, bias_V=self.bias, weights_N=weights_N))  # type: ignore[return-value]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See `chunked_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        weights_N: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = _Gradients(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[:3])
        matrix_VD = weight_VD.to(hidden_ND.dtype)
        wide = _wide(hidden_ND.dtype)
        weights_N = weights_N.to(wide)
        losses_N = hidden_ND.new_zeros(labels_N.shape, dtype=wide)
        correct_N = torch.zeros_like(labels_N, dtype=torch.bool)
        for rows in (labels_N != IGNORE).nonzero().squeeze(1).split(chunk):
            hidden_nD, labels_n = hidden_ND[rows], labels_N[rows]
            logits_nV = (hidden_nD @ matrix_VD.T).to(wide)
            if bias_V is not None:
                logits_nV += bias_V.to(wide)
            target_n = logits_nV.gather(1, labels_n[:, None]).squeeze(1)
            top_n = logits_nV.amax(1)
            exps_nV = logits_nV.sub_(top_n[:, None]).exp_()
            sums_n = exps_nV.sum(1)
            losses_N[rows] = sums_n.log() + top_n - target_n
            correct_N[rows] = target_n >= top_n
            if grads.wanted:
                weights_n = weights_N[rows]
                grad_nV = exps_nV.mul_((weights_n / sums_n)[:, None])
                grad_nV.scatter_add_(1, labels_n[:, None], -weights_n[:, None])
                grads.add(rows, hidden_nD, matrix_VD, grad_nV)
                del grad_nV
            del logits_nV, exps_nV  # or they stay until the next chunk's logits are made
        ctx.grads = grads
        ctx.mark_non_differentiable(losses_N, correct_N)
        return (losses_N * weights_N).sum(), losses_N, correct_N

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grads is None:
            raise RuntimeError(
                "chunked_cross_entropy keeps its gradients for one backward pass; compute the loss again."
            )
        grads, ctx.grads = ctx.grads, None
        return (*grads.scaled(grad_total), None, None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Float32, or the type itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)


class _Gradients:
    """Float32 sums of the gradients that are wanted (the tensor's own dtype where that is float32 or wider)."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needed: tuple[bool, ...]) -> None:
        inputs = (hidden_ND, weight_VD, bias_V)
        self.wanted = any(needed)
        self.dtypes = tuple(None if t is None else t.dtype for t in inputs)
        self.sums = [
            torch.zeros_like(t, dtype=_wide(t.dtype)) if want and t is not None else None
            for t, want in zip(inputs, needed, strict=True)
        ]

    def add(self, rows: Tensor, hidden_nD: Tensor, matrix_VD: Tensor, grad_nV: Tensor) -> None:
        low_nV = grad_nV.to(hidden_nD.dtype)
        hidden_sum, weight_sum, bias_sum = self.sums
        if hidden_sum is not None:
            hidden_sum[rows] = (low_nV @ matrix_VD).to(hidden_sum.dtype)
        if weight_sum is not None:
            if weight_sum.dtype == hidden_nD.dtype:
                weight_sum.addmm_(low_nV.T, hidden_nD)
            else:
                weight_sum += low_nV.T @ hidden_nD
        if bias_sum is not None:
            bias_sum += grad_nV.sum(0)

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        out = []
        for total, dtype in zip(self.sums, self.dtypes, strict=True):
            out.append(None if total is None else total.mul_(factor).to(dtype))
        return out
