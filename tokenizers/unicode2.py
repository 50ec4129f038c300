"""UniCode²: images → one code a patch of a large codebook that was clustered, not trained (PAPERS §3: cascade, C1).

Axis letters: B batch, T tokens an image, N vectors, K codes, P cells, C width of a feature and of a code.
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
"""Up to so many codes all are compared: a search of the tree gains nothing there."""
NO_DECODER = (
    "UniCode² has no pixel decoder: a code says what a patch shows, not its pixels. An export draws through a diffusion decoder "
    "where the recipe sets `bridge.decoder` (docs/unicode2.md)."
)


class Unicode2(SavedTokenizer):
    """The whole tokenizer: frozen encoder and frozen codebook. A code is the one nearest to a patch's feature.

    index: the codes (K, C) with their tree and how much of it a search sees; it may lie in a mapped file and is not copied.
    spherical: the codes lie on the unit sphere, and features are put there too. Runs in eval mode, without gradients; the
    search is float32 under autocast too. ConfigError: codes of another width than the features.
    """

    system = SYSTEM
    encoder: VisionEncoder
    codes: Tensor
    cells: Tensor
    cell_of: Tensor
    has_decoder, no_decoder = False, NO_DECODER
    has_semantic_only = False
    num_semantic, num_sub = 0, 1  # no level of codes above the flat ones

    def __init__(self, encoder: VisionEncoder, index: CodeIndex, *, spherical: bool = False) -> None:
        super().__init__()
        if index.codes.shape[1] != encoder.dim:
            raise ConfigError(
                f"The codes are {index.codes.shape[1]} wide, but the encoder's features {encoder.dim}. Make the codebook "
                "from features of this encoder."
            )
        self.encoder, self.spherical, self.probes = encoder, spherical, index.probes
        self._index: CodeIndex | None = index
        for name in ("codes", "cells", "cell_of"):
            self.register_buffer(name, getattr(index, name))
        self.requires_grad_(False).eval()

    def _apply(self, *args: Any, **options: Any) -> Unicode2:
        self._index = None  # it holds tensors beside the buffers that are moved
        return super()._apply(*args, **options)

    @property
    def index(self) -> CodeIndex:
        """The codes as they are searched, where the tokenizer lies."""
        if self._index is None:
            self._index = CodeIndex(self.codes, self.cells, self.cell_of, self.probes)
        return self._index

    @property
    def num_codes(self) -> int:
        """K."""
        return len(self.codes)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.encoder.grid

    @property
    def image_size(self) -> int:
        """Pixels a side that `encode` wants."""
        return self.encoder.image_size

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the codes of a token: one number."""
        return ()

    @property
    def embed_splits(self) -> tuple[int, ...]:
        """Widths of the parts of a code's vector: one."""
        return (self.codes.shape[1],)

    @property
    def device(self) -> torch.device:
        """Where the weights lie; inputs are brought there."""
        return self.codes.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of images (B, 3, S, S) in [-1, 1]: int64 (B, T). DataError: other shape, dtype or range, NaN."""
        check_pixels(pixels, self.image_size)
        if not len(pixels):
            return torch.empty(0, self.num_tokens, dtype=torch.int64, device=self.device)
        return self.nearest(self.encoder(pixels.to(self.device, torch.float32)))

    @torch.compiler.disable
    @torch.no_grad()
    def nearest(self, features_BTC: Tensor) -> Tensor:
        """The code nearest to each feature: int64 (B, T). Exact up to `EXACT_CODES` codes, else with the recall that the
        stage `codebook` measured. DataError: a feature that is not finite."""
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
        """ConfigError: there is no pixel decoder."""
        raise ConfigError(self.no_decoder)

    @torch.no_grad()
    def embed(self, codes: Tensor) -> Tensor:
        """Vectors of the frozen codebook, free of context: float32 (…, C). VocabularyError: not this tokenizer's codes."""
        return F.embedding(checked_codes(codes, self.num_codes, None).to(self.device, torch.int64), self.codes)

    def code_vectors(self) -> Tensor:
        """`embed` of every code: float32 (K, C), the codebook itself, which may lie in a mapped file. Not to be written to."""
        return self.codes

    def config_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
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
        """The codes stay in the file, which is mapped: processes of one machine share them, and a range of codes reads no
        more than that."""
        try:
            encoder = VisionEncoder.from_pretrained(os.path.join(folder, ENCODER_NAME), config["encoder_layer"])
            tensors = load_file(os.path.join(folder, WEIGHTS_NAME))
            search = None if config["search"] is None else Probes(**config["search"])
            index = CodeIndex(tensors["codes"], tensors["cells"], tensors["cell_of"], search)
            if len(index.codes) != config["num_codes"]:
                raise ValueError(f"{len(index.codes)} codes lie there, num_codes is {config['num_codes']}")
            return cls(encoder, index, spherical=bool(config["spherical"]))
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError, ConfigError) as error:
            raise ArtifactError(
                f"The UniCode² in {source} is torn, or its weights do not fit its {CONFIG_NAME}: {error!r}. Save it again."
            ) from error
