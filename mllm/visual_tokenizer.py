"""The interface of a visual tokenizer that the language model's side uses.

Axes: B images, T tokens per image, P parts of a code vector, N codes, C width of a code vector.
"""

from __future__ import annotations

import os
from typing import Protocol

from torch import Tensor


class VisualTokenizer(Protocol):
    """A trained visual tokenizer, as `smalti.tokenizers.loading.load_tokenizer` loads it."""

    @property
    def num_codes(self) -> int:
        """Number of codes (of each codebook)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of a token's codes: () or (2, R)."""

    @property
    def embed_splits(self) -> tuple[int, ...]:
        """Widths of the P parts of a code vector."""

    @property
    def no_decoder(self) -> str:
        """Why there is no `decode`; only of a tokenizer without one."""

    def code_vectors(self) -> Tensor:
        """The vectors of all codes: (N, C), or of two codebooks (2, N, C / 2)."""

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors (B, T, C) of codes (B, T, *code_shape)."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes int64 (B, T, *code_shape) of pixels (B, 3, H, W) in [-1, 1]."""

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of codes (B, T, *code_shape)."""

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a folder or URL."""
