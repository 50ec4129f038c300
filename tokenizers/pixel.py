"""SemHiTok's pixel stage: the semantic-guided hierarchical codebook (arXiv 2503.06764).

Axis letters: B batch, N tokens, D pixel code width, S semantic code width, H W pixels, K semantic
codes, M sub-codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import ConfigError
from smalti.schema import PixelStage, VitSize
from smalti.tokenizers.quantizers import Float32Buffers
from smalti.tokenizers.subcodes import FlatCodebook, SubCodebooks, flatten_codes, split_codes
from smalti.tokenizers.vit import PixelDecoder, VitEncoder

NEEDS_SEMANTIC = "a guided pixel tokenizer needs the semantic codes of its patches"


@dataclass
class PixelOutputs:
    """Output of `PixelTokenizer`.

    Attributes:
        pixels: reconstructed images (B, 3, H, W), not clamped.
        vectors: the pixel encoder's p (B, N, D).
        codes: flat codes int64 (B, N); None before quantization starts.
        vq_loss: codebook and commitment loss, float32 scalar; 0 before quantization starts.
        semantic_only: images of the semantic codes alone, or None.
    """

    pixels: Tensor
    vectors: Tensor
    codes: Tensor | None
    vq_loss: Tensor
    semantic_only: Tensor | None


def unit_scale(codes_KS: Tensor) -> float:
    """Factor that gives codes a mean square of 1 per channel; 1 on meta, where they have no values."""
    if codes_KS.is_meta:
        return 1.0
    return float(codes_KS.square().mean().clamp(min=1e-12).rsqrt())


class PixelTokenizer(Float32Buffers):
    """Pixel encoder, pixel codebooks and pixel decoder, with frozen semantic codes.

    The decoder reads semantic codes scaled to a mean square of 1 per channel.

    Args:
        semantic_codes: float (K, S). None without guidance: `num_codes` (K·m) flat pixel codes are
            searched, and the
            pixel code alone is decoded.
    """

    float32_buffers = ("semantic_codes",)
    semantic_codes: Tensor | None

    def __init__(
        self,
        stage: PixelStage,
        semantic_codes: Tensor | None,
        image_size: int,
        grid: tuple[int, int],
        num_codes: int | None = None,
        decoder_size: VitSize | None = None,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.image_size = image_size
        self.grid = grid
        self.guided = semantic_codes is not None
        self.decoder_size = decoder_size or stage.decoder
        self.semantic_only_decoder: PixelDecoder | None = None
        self.codebook: SubCodebooks | FlatCodebook
        if semantic_codes is not None:
            semantic_codes = semantic_codes.detach().float().clone()
            self.register_buffer("semantic_codes", semantic_codes, persistent=False)
            self.semantic_scale = unit_scale(semantic_codes)
            self.codebook = SubCodebooks(len(semantic_codes), stage.codes, stage.dim, stage.beta)
            if stage.semantic_only_decoder:
                self.semantic_only_decoder = PixelDecoder(
                    image_size, grid, stage.decoder, (semantic_codes.shape[1],)
                )
        else:
            if num_codes is None:
                raise ConfigError(
                    "Without guidance the pixel tokenizer needs a number of codes (codebook.size x m)."
                )
            if stage.semantic_only_decoder:
                raise ConfigError(
                    "tokenizer.pixel.semantic_only_decoder needs tokenizer.guidance: true."
                )
            self.semantic_codes = None
            self.codebook = FlatCodebook(num_codes, stage.dim, stage.beta)
        self.encoder = VitEncoder(image_size, grid, stage.encoder, stage.dim)
        self.decoder = PixelDecoder(image_size, grid, self.decoder_size, self._decoder_dims())

    def _decoder_dims(self) -> tuple[int, ...]:
        if self.semantic_codes is None or self.stage.concat == "none":
            return (self.stage.dim,)
        semantic = self.semantic_codes.shape[1]
        return (
            (semantic + self.stage.dim,)
            if self.stage.concat == "dim"
            else (semantic, self.stage.dim)
        )

    @property
    def num_codes(self) -> int:
        """Size of the flat vocabulary: K·m."""
        return len(self.codebook.codes)

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, for the adaptive GAN weight."""
        return self.decoder.last_layer

    def encode_vectors(self, pixels_BCHW: Tensor) -> Tensor:
        """The pixel encoder's vectors p: (B, N, D)."""
        return self.encoder(pixels_BCHW.to(self.encoder.embed.weight.dtype))

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor, semantic_ids_BN: Tensor | None = None) -> Tensor:
        """Flat codes t = i·m + j, or the pixel codes without guidance: int64 (B, N)."""
        p_BND = self.encode_vectors(pixels_BCHW)
        if isinstance(self.codebook, FlatCodebook):
            return self.codebook.assign(p_BND)
        if semantic_ids_BN is None:
            raise ValueError(NEEDS_SEMANTIC)
        return self._flat(self.codebook.assign(p_BND, semantic_ids_BN), semantic_ids_BN)

    def _flat(self, ids_BN: Tensor, semantic_ids_BN: Tensor | None) -> Tensor:
        if semantic_ids_BN is None or not self.guided:
            return ids_BN
        return flatten_codes(semantic_ids_BN, ids_BN, self.stage.codes)

    def _semantic(self, semantic_ids_BN: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.semantic_codes is not None
        return (F.embedding(semantic_ids_BN, self.semantic_codes) * self.semantic_scale).to(dtype)

    def _decode(self, q_BND: Tensor, semantic_ids_BN: Tensor | None) -> Tensor:
        q_BND = q_BND.to(self.decoder.head.weight.dtype)
        if semantic_ids_BN is None or not self.guided or self.stage.concat == "none":
            return self.decoder(q_BND)
        c_BNS = self._semantic(semantic_ids_BN, q_BND.dtype)
        if self.stage.concat == "length":
            return self.decoder(c_BNS, q_BND)
        return self.decoder(torch.cat([c_BNS, q_BND], -1))

    def decode(self, codes_BN: Tensor) -> Tensor:
        """Images of flat codes: (B, 3, H, W), not clamped."""
        semantic_ids = split_codes(codes_BN, self.stage.codes)[0] if self.guided else None
        return self._decode(F.embedding(codes_BN, self.codebook.codes), semantic_ids)

    def decode_semantic_only(self, semantic_ids_BN: Tensor) -> Tensor:
        """Images of semantic codes alone: (B, 3, H, W), not clamped.

        Raises:
            ConfigError: if that decoder was not trained.
        """
        if self.semantic_only_decoder is None:
            raise ConfigError(
                "This tokenizer has no decoder for semantic codes alone. Train it with "
                "tokenizer.pixel.semantic_only_decoder=true."
            )
        return self.semantic_only_decoder(
            self._semantic(semantic_ids_BN, self.decoder.head.weight.dtype)
        )

    def forward(
        self, pixels_BCHW: Tensor, semantic_ids_BN: Tensor | None = None, quantize: bool = True
    ) -> PixelOutputs:
        """Reconstruct images.

        The semantic-only decoder shares no weights with the rest.

        Args:
            quantize: False decodes the vectors themselves, before the codebooks are initialized.
        """
        if not self.guided:
            semantic_ids_BN = None
        elif semantic_ids_BN is None:
            raise ValueError(NEEDS_SEMANTIC)
        p_BND = self.encode_vectors(pixels_BCHW)
        codes = None
        q_BND = p_BND
        vq = p_BND.new_zeros((), dtype=torch.float32)
        if quantize:
            quantized = self.codebook(p_BND, semantic_ids_BN)
            q_BND = quantized.q
            vq = quantized.loss
            codes = self._flat(quantized.ids, semantic_ids_BN)
        semantic_only = None
        if self.semantic_only_decoder is not None and semantic_ids_BN is not None:
            semantic_only = self.decode_semantic_only(semantic_ids_BN)
        return PixelOutputs(self._decode(q_BND, semantic_ids_BN), p_BND, codes, vq, semantic_only)

    def replace_decoder(self, size: VitSize) -> None:
        """Install a new decoder of this size (stage D) and freeze everything else.

        Its weights depend on torch's global seed.
        """
        self.requires_grad_(False)
        parameter = self.codebook.codes
        self.decoder_size = size
        self.decoder = PixelDecoder(self.image_size, self.grid, size, self._decoder_dims()).to(
            parameter
        )
        self.decoder.requires_grad_(True)
