"""FLOPs and memory of a training step, traced without computing it.

Weights are fake tensors, which have shapes and no values, and so is everything computed from them.
What depends on the batch alone (token ids, masks) is small and is computed, so that the step can
read it: the number of visual tokens, say, or which labels count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from smalti.mllm.losses import LossHead
from smalti.workflows.plan.flops import flops_of, precision_of
from smalti.workflows.train.memory import blocks_of

aten = torch.ops.aten
PRECISIONS = ("bf16", "tf32", "fp32")

Autocast = Callable[[], AbstractContextManager[object]]
"""Opens the autocast of the stage's precision."""
Backward = Callable[[Tensor], None]
"""Runs the backward pass of a loss."""
Step = Callable[[Backward, Autocast], None]
"""One micro batch of a training step."""


class Traced(NamedTuple):
    """What one micro batch costs.

    Memory leaves out parameters, buffers, their gradients, and all that the losses of output heads
    hold: those work in chunks, so they do not grow with the batch as all else does (see
    `models.Head`).

    Attributes:
        flops: by precision: bf16; fp32; tf32, the float32 convolutions, which cuDNN rounds.
        saved: most bytes held when a backward pass begins.
        peak: most bytes held at once.
        bare_saved: `saved` without copies of weights in another precision, which autocast keeps.
        bare_peak: `peak` without them.
        calls: operators called, except views.
    """

    flops: dict[str, float]
    saved: float
    peak: float
    bare_saved: float
    bare_peak: float
    calls: int


def trace(modules: nn.Module, step: Step, *, bf16: bool) -> Traced:
    """Cost of `step`.

    Args:
        modules: all modules that the step uses, on the meta device; fake tensors replace their
            weights. Gradients exist from the start, as in all but a step's first micro batch.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        counter = _Counter(_materialise(modules))
        with counter, counter.without_heads(modules):

            def backward(loss: Tensor) -> None:
                counter.note_saved()
                loss.backward()

            step(backward, lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16))
    return Traced(
        counter.flops,
        counter.saved,
        counter.peak,
        counter.bare_saved,
        counter.bare_peak,
        counter.calls,
    )


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """Let transformer blocks keep their inputs only, as `train.activation_checkpointing` does."""
    blocks = list(blocks_of(module))
    for block in blocks:
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _materialise(modules: nn.Module) -> list[Tensor]:
    """Replace parameters and buffers by fake CPU tensors; all of these, and their gradients."""
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


class _Counter(TorchDispatchMode):
    """Counts FLOPs, calls, and the bytes of all storages that exist at a time."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.flops = dict.fromkeys(PRECISIONS, 0.0)
        self.calls = 0
        self.live = 0
        self.peak = 0
        self.saved = 0
        self.bare = 0
        self.bare_peak = 0
        self.bare_saved = 0
        self.in_head = False
        self.weights = {id(t.untyped_storage()) for t in held if isinstance(t, nn.Parameter)}
        self.held = held  # their storages live as long as they are known by id
        self.known = {id(t.untyped_storage()) for t in held}

    @contextmanager
    def without_heads(self, modules: nn.Module) -> Iterator[None]:
        """Leave the memory of output heads' losses out of the count."""

        def enter(*_: object) -> None:
            self.in_head = True

        def leave(*_: object) -> None:
            self.in_head = False

        heads = [module for module in modules.modules() if isinstance(module, LossHead)]
        hooks = [head.register_forward_pre_hook(enter) for head in heads]
        hooks += [head.register_forward_hook(leave) for head in heads]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def note_saved(self) -> None:
        """Here a backward pass begins."""
        self.saved = max(self.saved, self.live)
        self.bare_saved = max(self.bare_saved, self.bare)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        out = _run(func, args, kwargs)
        # fake tensors ask for their device by `prim`
        self.calls += func.namespace == "aten" and not func.is_view
        count = flops_of(func, args, kwargs, out)
        if count:
            self.flops[precision_of(func, out)] += count
        copy = func is aten._to_copy.default and _storage_id(args[0]) in self.weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, copy)
        return out

    def _note(self, tensor: Tensor, copy: bool) -> None:
        """Count the tensor's storage, if it is new, until it is freed."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.known:
            return
        size = 0 if self.in_head else int(storage.nbytes())
        self.known.add(key)
        weakref.finalize(storage, self._freed, key, size, copy).atexit = False
        self._change(size, copy)

    def _change(self, size: int, copy: bool) -> None:
        self.live += size
        self.bare += 0 if copy else size
        self.peak = max(self.peak, self.live)
        self.bare_peak = max(self.bare_peak, self.bare)

    def _freed(self, key: int, size: int, copy: bool) -> None:
        self.known.discard(key)
        self._change(-size, copy)


def _storage_id(value: object) -> int | None:
    return id(value.untyped_storage()) if isinstance(value, Tensor) else None


def _run(func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Call an operator: for real if all its tensors have values, else on fake ones."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    if func is aten.masked_select.default:
        return _masked_select(*tensors)
    if func.overloadpacket in _INDEXED:
        args = (args[0], _positions(args[1]), *args[2:])
    return func(*args, **kwargs)


_INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
"""Operators whose second argument may hold masks: their outputs depend on how many are true."""


def _positions(indices: object) -> list[Tensor | None]:
    """Indices in which positions stand in for masks that have values."""
    found: list[Tensor | None] = []
    assert isinstance(indices, Sequence)
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            found.append(index)
            continue
        with unset_fake_temporarily():
            found += index.nonzero().unbind(1)
    return found


def _masked_select(values: Tensor, mask: Tensor) -> Tensor:
    """As many elements as the mask, which has values, selects: masked_scatter's gradient."""
    with unset_fake_temporarily():
        count = int(mask.expand(torch.broadcast_shapes(values.shape, mask.shape)).sum())
    return values.new_empty(count)
