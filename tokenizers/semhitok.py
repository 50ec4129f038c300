"""SemHiTok: one flat code per patch, t = i·m + j (arXiv 2503.06764).

Axis letters: B batch, T tokens per image, H W pixels, V the flat vocabulary (K·m), C width of a
code's vector.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smalti.errors import ArtifactError, ConfigError
from smalti.schema import TokenizerSection, VitSize
from smalti.tokenizers.encoders import VisionEncoder, check_pixels
from smalti.tokenizers.pixel import PixelOutputs, PixelTokenizer
from smalti.tokenizers.saved import (
    CONFIG_NAME,
    ENCODER_NAME,
    WEIGHTS_NAME,
    SavedTokenizer,
    checked_codes,
    under,
)
from smalti.tokenizers.semantic import SemanticTokenizer
from smalti.tokenizers.subcodes import split_codes

__all__ = ["PixelOutputs", "PixelTokenizer", "SemHiTok", "SemanticTokenizer"]

SYSTEM = "semhitok"


class SemHiTok(SavedTokenizer):
    """The trained tokenizer: frozen encoder, semantic codebook, pixel codebooks, decoder.

    Eval mode, no gradients, float32; on a CPU the same input gives the same bits.

    Args:
        section: the recipe's tokenizer section.
        pixel: pixel encoder, codebooks and decoder.
        semantic: None without guidance, when codes depend on pixels only.
        encoder: None without guidance.
    """

    system = SYSTEM
    encoder: VisionEncoder | None

    def __init__(
        self,
        section: TokenizerSection,
        pixel: PixelTokenizer,
        semantic: SemanticTokenizer | None = None,
        encoder: VisionEncoder | None = None,
    ) -> None:
        super().__init__()
        if section.guidance != (semantic is not None) or section.guidance != (encoder is not None):
            raise ConfigError(
                "SemHiTok has an encoder and a semantic part with guidance, and neither without."
            )
        if encoder is not None and semantic is not None:
            if encoder.grid != pixel.grid or encoder.image_size != pixel.image_size:
                raise ConfigError(
                    f"The encoder reads {encoder.image_size} px as {encoder.grid} patches, the pixel tokenizer "
                    f"{pixel.image_size} px as {pixel.grid}."
                )
            if encoder.dim != semantic.feature_dim:
                raise ConfigError(
                    f"The encoder's features are {encoder.dim} wide, expected {semantic.feature_dim}."
                )
        self.section = section
        self.pixel = pixel
        self.semantic = semantic
        self.encoder = encoder
        self.requires_grad_(False).eval()

    @property
    def num_codes(self) -> int:
        """V, the size of the flat vocabulary."""
        return self.pixel.num_codes

    @property
    def num_sub(self) -> int:
        """m, sub-codes per semantic code (1 without guidance)."""
        return self.section.pixel.codes if self.section.guidance else 1

    @property
    def num_semantic(self) -> int:
        """K, the number of semantic codes (0 without guidance)."""
        return 0 if self.semantic is None else self.semantic.num_codes

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.pixel.grid

    @property
    def image_size(self) -> int:
        """Side of the images that `encode` takes and `decode` returns, in pixels."""
        return self.pixel.image_size

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of a token's codes: a single code."""
        return ()

    @property
    def embed_splits(self) -> tuple[int, ...]:
        """Widths of the parts of a code's vector: (semantic, pixel), or (pixel,) without guidance."""
        return ((self.section.semantic.dim,) if self.section.guidance else ()) + (
            self.section.pixel.dim,
        )

    @property
    def has_semantic_only(self) -> bool:
        """Whether `decode_semantic_only` can be called."""
        return self.pixel.semantic_only_decoder is not None

    @property
    def device(self) -> torch.device:
        """Device of the weights; inputs are moved there."""
        return self.pixel.codebook.codes.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Flat codes of images (B, 3, S, S) in [-1, 1]: int64 (B, T).

        Raises:
            DataError: for another shape, dtype or range, or NaN.
        """
        check_pixels(pixels, self.image_size)
        if not len(pixels):
            return torch.empty(0, self.num_tokens, dtype=torch.int64, device=self.device)
        pixels = pixels.to(self.device, torch.float32)
        return self.pixel.encode(pixels, self._semantic_ids(pixels))

    def _semantic_ids(self, pixels: Tensor) -> Tensor | None:
        if self.encoder is None or self.semantic is None:
            return None
        return self.semantic.encode(self.encoder(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images of flat codes (B, T): float32 (B, 3, S, S) in [-1, 1].

        Raises:
            VocabularyError: for codes that are not this tokenizer's.
        """
        t = self._checked(codes, whole=True)
        return self.pixel.decode(t).float().clamp(-1, 1) if len(t) else self._no_images()

    @torch.no_grad()
    def decode_semantic_only(self, codes: Tensor) -> Tensor:
        """Images of the semantic codes alone, of flat codes (B, T); see `decode`.

        Raises:
            ConfigError: if that decoder was not trained.
        """
        ids, _ = split_codes(self._checked(codes, whole=True), self.num_sub)
        return (
            self.pixel.decode_semantic_only(ids).float().clamp(-1, 1)
            if len(ids)
            else self._no_images()
        )

    def _no_images(self) -> Tensor:
        return torch.empty(0, 3, self.image_size, self.image_size, device=self.device)

    @torch.no_grad()
    def embed(self, codes: Tensor) -> Tensor:
        """Input vectors of a language model, [c_i ; C_pix^i[j]]: float32 (…, C)."""
        t = self._checked(codes, whole=False)
        pixel = F.embedding(t, self.pixel.codebook.codes.float())
        if self.semantic is None:
            return pixel
        semantic_ids, _ = split_codes(t, self.num_sub)
        return torch.cat([F.embedding(semantic_ids, self.semantic.codes), pixel], -1)

    def code_vectors(self) -> Tensor:
        """`embed` of every code: float32 (V, C)."""
        return self.embed(torch.arange(self.num_codes))

    def _checked(self, codes: Tensor, whole: bool) -> Tensor:
        """Codes as int64 on the device; VocabularyError if they are not this tokenizer's."""
        return checked_codes(codes, self.num_codes, self.grid if whole else None).to(
            self.device, torch.int64
        )

    def config_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "system": self.system,
            "format": self.format,
            "image_size": self.image_size,
            "grid": list(self.grid),
            "num_codes": self.num_codes,
            "num_semantic": self.num_semantic,
            "num_sub": self.num_sub,
            "feature_dim": None if self.semantic is None else self.semantic.feature_dim,
            "encoder_layer": None if self.encoder is None else self.encoder.layer,
            "embed_splits": list(self.embed_splits),
            "decoder_size": self.pixel.decoder_size.model_dump(mode="json"),
            "tokenizer": self.section.model_dump(mode="json"),
        }

    @classmethod
    def _load(cls, config: Mapping[str, Any], folder: str, source: str) -> Self:
        try:
            section = TokenizerSection.model_validate(config["tokenizer"])
            grid = (int(config["grid"][0]), int(config["grid"][1]))
            semantic = encoder = None
            if section.guidance:
                encoder = VisionEncoder.from_pretrained(
                    os.path.join(folder, ENCODER_NAME), config["encoder_layer"]
                )
                semantic = SemanticTokenizer(
                    config["feature_dim"], section.semantic, config["num_semantic"], grid
                )
            tensors = load_file(os.path.join(folder, WEIGHTS_NAME))
            if semantic is not None:
                semantic.load_state_dict(under("semantic.", tensors))
            pixel = PixelTokenizer(
                section.pixel,
                None if semantic is None else semantic.codes,
                config["image_size"],
                grid,
                config["num_codes"],
                VitSize.model_validate(config["decoder_size"]),
            )
            pixel.load_state_dict(under("pixel.", tensors))
        except (KeyError, TypeError, IndexError, ValueError, ConfigError) as error:
            raise ArtifactError(
                f"{source}/{CONFIG_NAME} is not a SemHiTok config: {error!r}."
            ) from error
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ArtifactError(
                f"The weights in {source} are missing, damaged or do not fit its config: {error}. Save the tokenizer again."
            ) from error
        return cls(section, pixel, semantic, encoder)
