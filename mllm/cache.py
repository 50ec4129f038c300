"""Faster decoding: a preallocated key–value cache, and linear layers for few rows on a CPU.

Axes: R rows of the batch, L positions, H heads, D width of a head; M rows, N and K widths of a
linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin


class ReservedLayer(CacheLayerMixin):
    """Keys and values of one layer, preallocated for `max_length` positions.

    Attention sees a view of the filled positions. A growing cache copies itself at every token, and
    a static one is read to its end from the first token on; this one does neither.
    """

    is_sliding = False

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.dtype = key_states.dtype
        self.device = key_states.device
        self.keys = key_states.new_empty((rows, heads, self.max_length, width))
        self.values = value_states.new_empty((rows, heads, self.max_length, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, H, L, D); return views of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start = self.length
        self.length += key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length


def make_cache(config: PreTrainedConfig, max_length: int, *, static: bool) -> Cache:
    """An empty cache of a model for `max_length` positions.

    Args:
        config: the model's configuration.
        max_length: number of positions.
        static: transformers' own cache, whose shapes never change, as `torch.compile` and CUDA
            graphs need.
    """
    if static:
        return StaticCache(config=config, max_cache_len=max_length)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[ReservedLayer(max_length) for _ in range(layers)])


FEW_ROWS = range(2, 5)
"""Numbers of rows for which W xᵀ is faster on a CPU.

It is 2.7 times as fast at two rows, 1.5 times at four; not at one, nor from eight on.
"""


def few_row_linears(model: nn.Module, rows: int) -> list[nn.Linear]:
    """The linear layers that `as_columns` speeds up for `rows` rows.

    Those in float32 on a CPU, if `rows` is in `FEW_ROWS`.
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
    """Context in which these layers compute (W xᵀ)ᵀ instead of x Wᵀ.

    It is the same product by another routine of the matrix library.
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
