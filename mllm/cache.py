"""What makes decoding step by step cheap: a key–value cache laid out once, and linear layers for a
few rows on a CPU.

Axes: R rows of the batch, L positions, H heads, D width of a head; M rows, N and K widths of a
linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache
from transformers.cache_utils import CacheLayerMixin


class ReservedLayer(CacheLayerMixin):
    """Keys and values of one layer in room for `max_length` positions; attention sees a view of
    those that are filled.

    A growing cache copies itself at every token; a static one is read to its end from the first
    token on. This does neither.
    """

    is_sliding = False

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length, self.length = max_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((rows, heads, self.max_length, width))
        self.values = value_states.new_empty((rows, heads, self.max_length, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, H, L, D); all that are held so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length


def make_cache(config: Any, max_length: int, *, static: bool) -> Cache:
    """An empty cache of a model for `max_length` positions.

    `static`: transformers' own, whose shapes never change, which is what `torch.compile` and CUDA
    graphs want.
    """
    if static:
        return StaticCache(config=config, max_cache_len=max_length)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[ReservedLayer(max_length) for _ in range(layers)])


FEW_ROWS = range(2, 5)
"""Rows for which W xᵀ is the faster product on a CPU: 2.7 times at two rows, 1.5 at four; not at
one, nor from eight on.
"""


def few_row_linears(model: nn.Module, rows: int) -> list[nn.Linear]:
    """The linear layers of a model for which `as_columns` pays: those of float32 on a CPU, for so
    many rows; else none.
    """
    if rows not in FEW_ROWS:
        return []
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    return [
        layer
        for layer in layers
        if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    ]


@contextmanager
def as_columns(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Within, these layers compute (W xᵀ)ᵀ in place of x Wᵀ: the same numbers by another routine of
    the matrix library.
    """
    for layer in layers:
        layer.forward = partial(_columns, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _columns(layer: nn.Linear, x: Tensor) -> Tensor:
    x_MK = x.reshape(-1, layer.in_features)
    out_MN = (layer.weight @ x_MK.T).T
    out_MN = out_MN.contiguous() if layer.bias is None else out_MN + layer.bias
    return out_MN.view(*x.shape[:-1], layer.out_features)
