"""Cross entropy over a large vocabulary that never holds all logits.

Axes: N positions, n positions of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IGNORE = -100
PART = 1 << 26
"""Most numbers of a product that exist at once while it is added to a sum of another dtype."""


class ChunkedLoss(NamedTuple):
    """The loss of a batch of positions.

    Attributes:
        total: Σ weights · loss, 0-d, differentiable.
        losses_N: loss per position, 0 if ignored; not differentiable.
        correct_N: whether the label has the highest logit, False if ignored.
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
    """Weighted sum of next-token losses with at most chunk × V logits at once.

    Losses are float32. The gradients of hidden, weight and bias are computed in the forward pass,
    while a chunk's logits exist (three products in all, as with full logits). They are summed in
    float32 and returned in their tensors' own dtypes. So `backward` can run only once.

    Args:
        hidden_ND: hidden states.
        weight_VD: the head.
        labels_N: int64, IGNORE (−100) where nothing is predicted.
        chunk: positions per chunk, at least 1.
        bias_V: the head's bias.
        weights_N: one factor per position (default 1).
        low_sums: sum the weight's gradient in the weight's own dtype. For bf16 that holds 2 bytes
            per number instead of 6, and rounds once per chunk.
        scaled: the head is the weight with its first rows multiplied by a factor.
        kernel: whether liger-kernel computes the losses, and the gradient of a chunk's logits in
            their place; None: on GPUs, if it is installed.

    Raises:
        ValueError: if `chunk` is below 1.
        IndexError: if a label is outside [0, V).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    _check_labels(labels_N, weight_VD.shape[0])
    if weights_N is None:
        weights_N = torch.ones_like(labels_N, dtype=torch.float32)
    if kernel is None:
        kernel = has_kernel(hidden_ND)
    settings = _Settings(chunk, low_sums, scaled, kernel)
    return ChunkedLoss(
        *_ChunkedCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N, weights_N, settings)
    )


def _check_labels(labels_N: Tensor, num_rows: int) -> None:
    """Raise IndexError unless all labels are IGNORE or in [0, num_rows)."""
    valid_N = labels_N != IGNORE
    if bool((valid_N & ((labels_N < 0) | (labels_N >= num_rows))).any()):
        raise IndexError(
            f"the labels hold {int(labels_N[valid_N].min())} to {int(labels_N.max())}; expected ids "
            f"in [0, {num_rows}), the rows of the head, or {IGNORE} where nothing is predicted"
        )


class ScaledRows(NamedTuple):
    """The first `rows` of a matrix are multiplied by `factor` where they are used.

    See `smalti.mllm.row_lr_scaling`.
    """

    rows: int
    factor: float


class _Settings(NamedTuple):
    chunk: int
    low_sums: bool
    scaled: ScaledRows | None
    kernel: bool


class LossHead(nn.Linear):
    """An output head that can also compute its own loss.

    `head(hidden)` gives logits. With labels, the loss is computed inside this module's forward, so
    that what gathers a module's weight around its forward and backward (DeepSpeed ZeRO-3, FSDP) has
    gathered it then.
    """

    scaled: ScaledRows | None = None

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        labels_N: Tensor | None = None,
        weights_N: Tensor | None = None,
        chunk: int = 4096,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits (…, V), or with labels the three parts of a `ChunkedLoss` as a plain tuple.

        Args:
            input: hidden states (…, D); with labels (N, D).
            labels_N: see `chunked_cross_entropy`, as the others.
        """
        if labels_N is None:
            assert self.scaled is None, "a head of scaled rows gives losses only"
            return super().forward(input)
        found = chunked_cross_entropy(
            input,
            self.weight,
            labels_N,
            chunk,
            bias_V=self.bias,
            weights_N=weights_N,
            scaled=self.scaled,
        )
        return found.total, found.losses_N, found.correct_N


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
            del grad_nV  # otherwise it is held while the next chunk's logits are computed
        ctx.grads = grads
        ctx.mark_non_differentiable(losses_N, correct_N)
        return (losses_N * weights_N).sum(), losses_N, correct_N

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: object) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads: _Gradients | None = ctx.grads
        if grads is None:
            raise RuntimeError(
                "chunked_cross_entropy keeps its gradients for one backward pass; compute the loss "
                "again."
            )
        ctx.grads = None
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
    """Losses, whether the label is the best, and with weights the gradient on the logits.

    The gradient is that of Σ weights · loss; it overwrites float32 logits.
    """
    logits_nV = logits_nV.to(_wide(logits_nV.dtype))
    target_n = logits_nV.gather(1, labels_n[:, None]).squeeze(1)
    top_n = logits_nV.amax(1)
    exps_nV = logits_nV.sub_(top_n[:, None]).exp_()
    sums_n = exps_nV.sum(1)
    losses_n = sums_n.log() + top_n - target_n
    correct_n = target_n >= top_n
    if weights_n is None:
        return losses_n, correct_n, None
    grad_nV = exps_nV.mul_((weights_n / sums_n)[:, None])
    grad_nV.scatter_add_(1, labels_n[:, None], -weights_n[:, None])
    return losses_n, correct_n, grad_nV


def _by_liger(
    logits_nV: Tensor, labels_n: Tensor, weights_n: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `_by_torch`, by the kernel of liger-kernel.

    Softmax minus one-hot overwrites the logits, in their dtype. Of several best ids only the first
    counts as correct.
    """
    from liger_kernel.ops.cross_entropy import cross_entropy_forward  # pyright: ignore[reportMissingImports]  # an extra

    logits_nV.requires_grad_(weights_n is not None)  # asks the kernel for gradients
    losses_n, _, correct_n, _, grad_nV = cross_entropy_forward(
        logits_nV, labels_n, None, IGNORE, 0.0, 0.0, "none", None, False, True, False
    )
    if weights_n is None:
        return losses_n, correct_n.bool(), None
    grad_nV = grad_nV.detach()
    grad_nV.mul_(weights_n[:, None].to(grad_nV.dtype))
    return losses_n, correct_n.bool(), grad_nV


def has_kernel(hidden_ND: Tensor) -> bool:
    """Whether liger-kernel can compute the losses: on a GPU, if installed."""
    return (
        hidden_ND.is_cuda
        and hidden_ND.dtype != torch.float64
        and find_spec("liger_kernel") is not None
    )


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's, or that of the hidden states.

    Autocast casts the arguments of `@`, but nothing that is computed in place.
    """
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden_ND.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Float32, or the dtype itself if it is wider."""
    return torch.promote_types(dtype, torch.float32)


class _Gradients:
    """Sums of the gradients that are needed.

    In float32, or in the tensor's own dtype if that is wider; the weight's also in its own dtype
    with `low_sums`.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        needed: tuple[bool, ...],
        settings: _Settings,
    ) -> None:
        self.wanted = any(needed)
        self.scaled_rows = settings.scaled
        self.inputs_dtypes: list[torch.dtype | None] = []
        self.sums: list[Tensor | None] = []
        for tensor, need in zip((hidden_ND, weight_VD, bias_V), needed, strict=True):
            if tensor is None:
                self.inputs_dtypes.append(None)
                self.sums.append(None)
                continue
            own = settings.low_sums and tensor is weight_VD
            dtype = tensor.dtype if own else _wide(tensor.dtype)
            self.inputs_dtypes.append(tensor.dtype)
            self.sums.append(torch.zeros_like(tensor, dtype=dtype) if need else None)

    def add(self, rows: Tensor, hidden_nD: Tensor, matrix_VD: Tensor, grad_nV: Tensor) -> None:
        """Add the gradients of the chunk at positions `rows`, from those on its logits."""
        hidden_sum, weight_sum, bias_sum = self.sums
        if bias_sum is not None:
            bias_sum += grad_nV.sum(0, dtype=bias_sum.dtype)
        if self.scaled_rows:
            grad_nV[:, : self.scaled_rows.rows] *= self.scaled_rows.factor
        low_nV = grad_nV.to(hidden_nD.dtype)
        if hidden_sum is not None:
            hidden_sum[rows] = (low_nV @ matrix_VD).to(hidden_sum.dtype)
        if weight_sum is None:
            return
        if weight_sum.dtype == hidden_nD.dtype:
            weight_sum.addmm_(low_nV.T, hidden_nD)
            return
        step = max(1, PART // hidden_nD.shape[1])
        slices = zip(low_nV.split(step, dim=1), weight_sum.split(step), strict=True)
        for slice_nv, sum_vD in slices:
            sum_vD += slice_nv.T @ hidden_nD

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        """The gradients times a factor, in the dtypes of their tensors."""
        out: list[Tensor | None] = []
        for total, dtype in zip(self.sums, self.inputs_dtypes, strict=True):
            out.append(None if total is None else total.mul_(factor).to(dtype))
        return out
