"""A training step on fake tensors: its FLOPs, and the bytes it holds, without computing anything.

The step is the model's own code in its own precision, so the figures follow every change of a
model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from smalti.workflows.train.memory import blocks_of

aten = torch.ops.aten
PRECISIONS = ("bf16", "tf32", "fp32")


class Traced(NamedTuple):
    """FLOPs of a step by precision (bf16; fp32; tf32: float32 convolutions, which cuDNN rounds);
    bytes held when its first backward pass begins, and at most, besides parameters, buffers and
    gradients.

    `bare_saved`, `bare_peak`: the same without copies of weights in another precision, which
    autocast keeps. `calls`: operators called, views left out.
    """

    flops: dict[str, float]
    saved: float
    peak: float
    bare_saved: float
    bare_peak: float
    calls: int


Backward = Callable[[Tensor], None]
"""Runs the backward pass of a loss."""
Step = Callable[[Backward, Callable[[], AbstractContextManager[Any]]], None]
"""One micro batch of a training step, given `backward` and what opens autocast."""


def trace(modules: nn.Module, step: Step, *, bf16: bool) -> Traced:
    """What `step` costs.

    `modules` holds all parameters that it uses, on the meta device; their gradients are there from
    the start, as in all but a step's first micro batch.
    """
    with FakeTensorMode():
        held = _materialise(modules)
        with _Watch(held) as watch:

            def backward(loss: Tensor) -> None:
                watch.saved, watch.bare_saved = (
                    max(watch.saved, watch.live),
                    max(watch.bare_saved, watch.bare),
                )
                loss.backward()

            step(backward, lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16))
    return Traced(
        watch.flops, watch.saved, watch.peak, watch.bare_saved, watch.bare_peak, watch.calls
    )


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """Within, every transformer block keeps its inputs alone, as `train.activation_checkpointing`
    has it.
    """
    blocks = list(blocks_of(module))
    for block in blocks:
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without contents; within `trace`."""
    return torch.empty(shape, dtype=dtype)


def _materialise(modules: nn.Module) -> list[Tensor]:
    """Put fake CPU tensors of the same shapes in place of parameters and buffers; all of them,
    gradients too.
    """
    made: dict[int, Tensor] = {}
    held: list[Tensor] = []

    def replaced(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            held.append(new)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                held.append(new)
                if new.requires_grad:
                    new.grad = torch.empty_like(new)
                    held.append(new.grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in modules.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = replaced(tensor)  # type: ignore[assignment]
    return held


class _Watch(TorchDispatchMode):
    """Counts FLOPs, and the bytes of storages that come and go."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.flops = dict.fromkeys(PRECISIONS, 0.0)
        self.live, self.peak, self.saved, self.calls = 0, 0, 0, 0
        self.bare, self.bare_peak, self.bare_saved = 0, 0, 0
        self.weights = {id(t.untyped_storage()) for t in held if isinstance(t, nn.Parameter)}
        self.held = held  # their storages live as long as they are known by id
        self.known = {id(t.untyped_storage()) for t in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls += (
            func.namespace == "aten" and not func.is_view
        )  # fake tensors ask for their device by `prim`
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops[_precision(func, out)] += count(*args, **kwargs, out_val=out)
        copy = func is aten._to_copy.default and id(args[0].untyped_storage()) in self.weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, copy)
        return out

    def _note(self, tensor: Tensor, copy: bool) -> None:
        """Count the tensor's storage where it is new, until it goes."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.known:
            return
        size = int(storage.nbytes())
        self.known.add(key)
        weakref.finalize(storage, self._gone, key, size, copy).atexit = False
        self._change(size, copy)

    def _change(self, size: int, copy: bool) -> None:
        self.live += size
        self.bare += 0 if copy else size
        self.peak, self.bare_peak = max(self.peak, self.live), max(self.bare_peak, self.bare)

    def _gone(self, key: int, size: int, copy: bool) -> None:
        self.known.discard(key)
        self._change(-size, copy)


def _precision(func: Any, out: Any) -> str:
    first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    if first.dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if "convolution" in str(func) else "fp32"


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
