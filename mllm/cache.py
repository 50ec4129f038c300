"""A key–value cache with its memory laid out once, for decoding step by step.

Axes: R rows of the batch, L positions, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import CacheLayerMixin


class ReservedLayer(CacheLayerMixin):
    """Keys and values of one layer in room for `max_length` positions; attention sees a view of those that are filled.

    A growing cache copies itself at every token; a static one is read to its end from the first token on. This does neither.
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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
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
    """An empty cache of a model for `max_length` positions. `static`: transformers' own, whose shapes never change, which is
    what `torch.compile` and CUDA graphs want."""
    if static:
        return StaticCache(config=config, max_cache_len=max_length)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[ReservedLayer(max_length) for _ in range(layers)])
