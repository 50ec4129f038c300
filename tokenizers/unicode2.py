"""UniCode²: one code per patch, from a large clustered codebook (the frozen C1 of its cascade).

Axis letters: B batch, T tokens per image, N vectors, K codes, P cells, C width of a feature and of
a code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smalti.errors import ArtifactError, ConfigError, DataError
from smalti.tokenizers.code_index import CodeIndex, Probes
from smalti.tokenizers.encoders import VisionEncoder, check_pixels
from smalti.tokenizers.saved import (
    CONFIG_NAME,
    ENCODER_NAME,
    WEIGHTS_NAME,
    SavedTokenizer,
    checked_codes,
)

SYSTEM = "unicode2"
EXACT_CODES = 8192
"""Most codes that are searched exactly; for so few a tree search gains nothing."""
NO_DECODER = (
    "UniCode² has no pixel decoder: a code says what a patch shows, not its pixels. An export draws through a diffusion decoder "
    "if the recipe sets `bridge.decoder` (docs/unicode2.md)."
)


class Unicode2(SavedTokenizer):
    """Frozen encoder and frozen codebook; a token is the code nearest to a patch feature.

    Eval mode, no gradients; the search is float32 under any autocast.

    Args:
        index: codes (K, C) with their tree. They may lie in a mapped file and are not copied.
        spherical: codes are unit vectors, and features are normalized.

    Raises:
        ConfigError: if codes and features differ in width.
    """

    system = SYSTEM
    encoder: VisionEncoder
    codes: Tensor
    cells: Tensor
    cell_of: Tensor
    has_decoder = False
    no_decoder = NO_DECODER
    has_semantic_only = False
    num_semantic = 0  # the codes have no second level
    num_sub = 1

    def __init__(
        self, encoder: VisionEncoder, index: CodeIndex, *, spherical: bool = False
    ) -> None:
        super().__init__()
        if index.codes.shape[1] != encoder.dim:
            raise ConfigError(
                f"The codes are {index.codes.shape[1]} wide, but the encoder's features {encoder.dim}. Make the codebook "
                "from features of this encoder."
            )
        self.encoder = encoder
        self.spherical = spherical
        self.probes = index.probes
        self._index: CodeIndex | None = index
        for name in ("codes", "cells", "cell_of"):
            self.register_buffer(name, getattr(index, name))
        self.requires_grad_(False).eval()

    def _apply(self, *args: Any, **options: Any) -> Unicode2:
        self._index = None  # it holds tensors beside the buffers that are moved
        return super()._apply(*args, **options)

    @property
    def index(self) -> CodeIndex:
        """The search index, on the tokenizer's device."""
        if self._index is None:
            self._index = CodeIndex(self.codes, self.cells, self.cell_of, self.probes)
        return self._index

    @property
    def num_codes(self) -> int:
        """K, the size of the codebook."""
        return len(self.codes)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.encoder.grid

    @property
    def image_size(self) -> int:
        """Side of the images that `encode` takes, in pixels."""
        return self.encoder.image_size

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of a token's codes: a single code."""
        return ()

    @property
    def embed_splits(self) -> tuple[int, ...]:
        """Widths of the parts of a code's vector: one part."""
        return (self.codes.shape[1],)

    @property
    def device(self) -> torch.device:
        """Device of the weights; inputs are moved there."""
        return self.codes.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of images (B, 3, S, S) in [-1, 1]: int64 (B, T).

        Raises:
            DataError: for another shape, dtype or range, or NaN.
        """
        check_pixels(pixels, self.image_size)
        if not len(pixels):
            return torch.empty(0, self.num_tokens, dtype=torch.int64, device=self.device)
        return self.nearest(self.encoder(pixels.to(self.device, torch.float32)))

    @torch.compiler.disable
    @torch.no_grad()
    def nearest(self, features_BTC: Tensor) -> Tensor:
        """The code nearest to each feature (B, T, C): int64 (B, T).

        Exact up to `EXACT_CODES` codes, else with the recall that the stage `codebook` measured.

        Raises:
            DataError: for NaN or Inf.
        """
        x_NC = features_BTC.flatten(0, 1).to(self.device, torch.float32)
        if not bool(torch.isfinite(x_NC.sum())):
            raise DataError(
                "The encoder gave features that are NaN or Inf. Check its weights, or choose another layer."
            )
        with torch.autocast(self.device.type, enabled=False):
            x_NC = F.normalize(x_NC, dim=-1) if self.spherical else x_NC
            index = self.index
            ids_N, _ = index.exact(x_NC) if self.num_codes <= EXACT_CODES else index.nearest(x_NC)
        return ids_N.view(features_BTC.shape[:2])

    def decode(self, codes: Tensor) -> NoReturn:
        """UniCode² has no pixel decoder: always raises ConfigError."""
        raise ConfigError(self.no_decoder)

    @torch.no_grad()
    def embed(self, codes: Tensor) -> Tensor:
        """Vectors of the frozen codebook: float32 (…, C).

        Raises:
            VocabularyError: for codes that are not this tokenizer's.
        """
        return F.embedding(
            checked_codes(codes, self.num_codes, None).to(self.device, torch.int64), self.codes
        )

    def code_vectors(self) -> Tensor:
        """The codebook: float32 (K, C). Read-only: it may be a mapped file."""
        return self.codes

    def config_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "system": self.system,
            "format": self.format,
            "image_size": self.image_size,
            "grid": list(self.grid),
            "num_codes": self.num_codes,
            "encoder_layer": self.encoder.layer,
            "embed_splits": list(self.embed_splits),
            "spherical": self.spherical,
            "search": None if self.probes is None else self.probes._asdict(),
        }

    @classmethod
    def _load(cls, config: Mapping[str, Any], folder: str, source: str) -> Self:
        """Load with the codes in a mapped file: processes on a node share them, and pages load on
        use.
        """
        try:
            encoder = VisionEncoder.from_pretrained(
                os.path.join(folder, ENCODER_NAME), config["encoder_layer"]
            )
            tensors = load_file(os.path.join(folder, WEIGHTS_NAME))
            search = None if config["search"] is None else Probes(**config["search"])
            index = CodeIndex(tensors["codes"], tensors["cells"], tensors["cell_of"], search)
            if len(index.codes) != config["num_codes"]:
                raise ValueError(
                    f"found {len(index.codes)} codes, but num_codes is {config['num_codes']}"
                )
            return cls(encoder, index, spherical=bool(config["spherical"]))
        except (
            OSError,
            SafetensorError,
            RuntimeError,
            KeyError,
            TypeError,
            ValueError,
            ConfigError,
        ) as error:
            raise ArtifactError(
                f"The UniCode² tokenizer in {source} is damaged, or its weights do not fit its {CONFIG_NAME}: {error!r}. Save it again."
            ) from error
