"""Cross entropy over a large vocabulary that never holds all logits.

Axes: N positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IGNORE = -100
PART = 1 << 26
"""Numbers of a product that are there at once while it is added to a sum of another precision."""


class ChunkedLoss(NamedTuple):
    """`total` = Σ weights · loss, differentiable; the others, one a position (0 and False where
    ignored), are not.
    """

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
    low_sums: bool = False,
    scaled: ScaledRows | None = None,
    kernel: bool | None = None,
) -> ChunkedLoss:
    """Weighted sum of next-token losses, `chunk` positions at a time: at most chunk × V logits
    exist at once.

    labels_N: int64, IGNORE (−100) where nothing is predicted; weights_N: one factor a position
    (default 1). Losses are float32. The gradients of hidden, weight and bias are made in the
    forward pass, while a chunk's logits are there (three products in all, as with full logits),
    summed in float32 and returned in their tensors' own dtypes. So `backward` can run once only.
    low_sums: the weight's gradient is summed in the weight's own dtype; for one in bf16 that is 2
    bytes a number held instead of 6, and a rounding a chunk. scaled: the head is the weight with
    its first rows times a factor. A label outside [0, V) raises IndexError.

    kernel: whether liger-kernel makes the losses and the gradient of a chunk's logits, in place of
    them; None: on GPUs where it is installed.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    valid_N = labels_N != IGNORE
    if bool((valid_N & ((labels_N < 0) | (labels_N >= weight_VD.shape[0]))).any()):
        raise IndexError(f"a label lies outside [0, {weight_VD.shape[0]})")
    if weights_N is None:
        weights_N = torch.ones_like(labels_N, dtype=torch.float32)
    settings = _Settings(
        chunk, low_sums, scaled, has_kernel(hidden_ND) if kernel is None else kernel
    )
    return ChunkedLoss(
        *_ChunkedCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N, weights_N, settings)
    )


class ScaledRows(NamedTuple):
    """The first `rows` of a matrix stand for `factor` times what they hold: what moves them moves
    them so much less.
    """

    rows: int
    factor: float


class _Settings(NamedTuple):
    chunk: int
    low_sums: bool
    scaled: ScaledRows | None
    kernel: bool


class LossHead(nn.Linear):
    """A language model's output head that can also compute its own loss: `head(hidden)` gives
    logits as before.

    With labels the loss is made inside this module's forward, so whatever gathers a module's weight
    around its forward and backward (DeepSpeed ZeRO-3, FSDP) has it in place, without this file
    knowing of it.
    """

    scaled: ScaledRows | None = None

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        labels_N: Tensor | None = None,
        weights_N: Tensor | None = None,
        chunk: int = 4096,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits (…, V); or, with labels, the three parts of a ChunkedLoss as a plain tuple (input
        then is (N, D)).
        """
        if labels_N is None:
            assert self.scaled is None, "a head of scaled rows gives losses alone"
            return super().forward(input)
        return tuple(
            chunked_cross_entropy(
                input,
                self.weight,
                labels_N,
                chunk,
                bias_V=self.bias,
                weights_N=weights_N,
                scaled=self.scaled,
            )
        )  # type: ignore[return-value]


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
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = _Gradients(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[:3], settings)
        low = _product_dtype(hidden_ND)
        matrix_VD = weight_VD.to(low)
        wide = _wide(hidden_ND.dtype)
        weights_N = weights_N.to(wide)
        losses_N = hidden_ND.new_zeros(labels_N.shape, dtype=wide)
        correct_N = torch.zeros_like(labels_N, dtype=torch.bool)
        of_rows = _by_liger if settings.kernel else _by_torch
        for rows in (labels_N != IGNORE).nonzero().squeeze(1).split(settings.chunk):
            hidden_nD = hidden_ND[rows].to(low)
            losses_N[rows], correct_N[rows], grad_nV = of_rows(
                _logits(hidden_nD, matrix_VD, bias_V, settings.scaled),
                labels_N[rows],
                weights_N[rows] if grads.wanted else None,
            )
            if grad_nV is not None:
                grads.add(rows, hidden_nD, matrix_VD, grad_nV)
            del grad_nV  # or it stays until the next chunk's logits are made
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


def _logits(
    hidden_nD: Tensor, matrix_VD: Tensor, bias_V: Tensor | None, scaled: ScaledRows | None
) -> Tensor:
    logits_nV = hidden_nD @ matrix_VD.T
    if scaled:
        logits_nV[:, : scaled.rows] *= scaled.factor
    return logits_nV if bias_V is None else logits_nV.to(_wide(logits_nV.dtype)).add_(bias_V)


def _by_torch(
    logits_nV: Tensor, labels_n: Tensor, weights_n: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, whether the label is the best, and with weights the gradient of Σ weights · loss on
    the logits, which float32 logits give their place to.
    """
    logits_nV = logits_nV.to(_wide(logits_nV.dtype))
    target_n = logits_nV.gather(1, labels_n[:, None]).squeeze(1)
    top_n = logits_nV.amax(1)
    exps_nV = logits_nV.sub_(top_n[:, None]).exp_()
    sums_n = exps_nV.sum(1)
    found = sums_n.log() + top_n - target_n, target_n >= top_n
    if weights_n is None:
        return *found, None
    grad_nV = exps_nV.mul_((weights_n / sums_n)[:, None])
    return *found, grad_nV.scatter_add_(1, labels_n[:, None], -weights_n[:, None])


def _by_liger(
    logits_nV: Tensor, labels_n: Tensor, weights_n: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same by liger-kernel's kernel: softmax minus one-hot is written over the logits, in their
    dtype.

    Of several best ones only the first counts as correct.
    """
    from liger_kernel.ops.cross_entropy import cross_entropy_forward  # pyright: ignore[reportMissingImports]  # an extra

    logits_nV.requires_grad_(weights_n is not None)  # how the kernel is told to make gradients
    losses_n, _, correct_n, _, grad_nV = cross_entropy_forward(
        logits_nV, labels_n, None, IGNORE, 0.0, 0.0, "none", None, False, True, False
    )
    grad_nV = grad_nV.detach()
    return (
        losses_n,
        correct_n.bool(),
        None if weights_n is None else grad_nV.mul_(weights_n[:, None].to(grad_nV.dtype)),
    )


def has_kernel(hidden_ND: Tensor) -> bool:
    """Whether liger-kernel can make the losses: on a GPU, and installed."""
    return (
        hidden_ND.is_cuda
        and hidden_ND.dtype != torch.float64
        and find_spec("liger_kernel") is not None
    )


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The hidden states' own, or autocast's: it casts what `@` is given, and nothing that is
    computed in place.
    """
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden_ND.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Float32, or the type itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)


class _Gradients:
    """Float32 sums of the gradients that are wanted (the tensor's own dtype where that is float32
    or wider; of the weight with `low_sums` too).
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        needed: tuple[bool, ...],
        settings: _Settings,
    ) -> None:
        inputs, low, self.scaled_rows = (
            (hidden_ND, weight_VD, bias_V),
            settings.low_sums,
            settings.scaled,
        )
        self.wanted = any(needed)
        self.dtypes = tuple(None if t is None else t.dtype for t in inputs)
        self.sums = [
            torch.zeros_like(t, dtype=t.dtype if low and t is weight_VD else _wide(t.dtype))
            if want and t is not None
            else None
            for t, want in zip(inputs, needed, strict=True)
        ]

    def add(self, rows: Tensor, hidden_nD: Tensor, matrix_VD: Tensor, grad_nV: Tensor) -> None:
        hidden_sum, weight_sum, bias_sum = self.sums
        if bias_sum is not None:
            bias_sum += grad_nV.sum(0, dtype=bias_sum.dtype)
        if self.scaled_rows:
            grad_nV[:, : self.scaled_rows.rows] *= self.scaled_rows.factor
        low_nV = grad_nV.to(hidden_nD.dtype)
        if hidden_sum is not None:
            hidden_sum[rows] = (low_nV @ matrix_VD).to(hidden_sum.dtype)
        if weight_sum is not None:
            if weight_sum.dtype == hidden_nD.dtype:
                weight_sum.addmm_(low_nV.T, hidden_nD)
            else:
                step = max(1, PART // hidden_nD.shape[1])
                for part_nv, sum_vD in zip(
                    low_nV.split(step, dim=1), weight_sum.split(step), strict=True
                ):
                    sum_vD += part_nv.T @ hidden_nD

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        out = []
        for total, dtype in zip(self.sums, self.dtypes, strict=True):
            out.append(None if total is None else total.mul_(factor).to(dtype))
        return out
