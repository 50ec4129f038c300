"""A visual tokenizer of raw patches: a token is the nearest of K clustered patches.

No encoder, no decoder network.

Axis letters: B images, T tokens, K codes, P numbers of a patch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Self

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from smalti.tokenizers.kmeans import assign
from smalti.tokenizers.saved import WEIGHTS_NAME, SavedTokenizer, checked_codes
from smalti.tokenizers.vit import patchify, unpatchify

GRID = (4, 4)


class PatchVQ(SavedTokenizer):
    """Codes (K, P) are patches of pixels themselves."""

    system = "patchvq"
    encoder = None
    grid = GRID
    code_shape = ()
    has_semantic_only = False
    num_semantic = 0
    codes: Tensor

    def __init__(self, codes_KP: Tensor, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.num_codes = len(codes_KP)
        self.embed_splits = (codes_KP.shape[1],)
        self.register_buffer("codes", codes_KP)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Codes of images: int64 (B, T)."""
        patches_BTP = patchify(pixels_BCHW.float(), GRID)
        return assign(patches_BTP.flatten(0, 1), self.codes)[0].view(patches_BTP.shape[:2])

    def decode(self, codes_BT: Tensor) -> Tensor:
        """Images of codes: float (B, 3, S, S) in [-1, 1]."""
        return unpatchify(self.embed(codes_BT), GRID)

    def embed(self, codes: Tensor) -> Tensor:
        """The patch of each code: float32 (…, P)."""
        return F.embedding(
            checked_codes(codes, self.num_codes, None).long().to(self.codes.device), self.codes
        )

    def code_vectors(self) -> Tensor:
        """All patches: float32 (K, P)."""
        return self.codes

    def config_dict(self) -> dict[str, object]:
        """The content of `config.json`."""
        return {
            "system": self.system,
            "format": self.format,
            "image_size": self.image_size,
            "grid": list(GRID),
            "num_codes": self.num_codes,
            "embed_splits": list(self.embed_splits),
        }

    @classmethod
    def _load(cls, config: Mapping[str, object], folder: str, source: str) -> Self:
        return cls(
            load_file(os.path.join(folder, WEIGHTS_NAME))["codes"], int(str(config["image_size"]))
        )
