"""FLOPs of single operators, and the precision that they run in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def flops_of(
    func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object], out: object
) -> float:
    """FLOPs of one call of an operator; 0 for all but products, convolutions and attention."""
    count = _FLOPS.get(func._overloadpacket)
    return 0.0 if count is None else count(*args, **kwargs, out_val=out)


def precision_of(func: OpOverload, out: object) -> str:
    """Precision in which a GPU computes an operator with this output."""
    first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    if first.dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if "convolution" in str(func) else "fp32"


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""By operator: torch's own counts, and those of an in-place product and of attention on CPUs."""
