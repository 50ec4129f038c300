"""DualToken: pixel codes of shallow layers, semantic codes of a deep one (arXiv 2503.14324).

Axis letters: B batch, N tokens (patches), C tower width, D code width, R depth, H W pixels, E
embedding width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from smalti.errors import ArtifactError, ConfigError
from smalti.schema import DualStage
from smalti.tokenizers.encoders import VisionEncoder, check_pixels
from smalti.tokenizers.quantizers import VQ, EMAStats, Quantized
from smalti.tokenizers.residual import ResidualQuantizer
from smalti.tokenizers.saved import (
    CONFIG_NAME,
    ENCODER_NAME,
    WEIGHTS_NAME,
    SavedTokenizer,
    checked_codes,
)
from smalti.tokenizers.vit import PixelDecoder, init_linear

SYSTEM = "dualtoken"
BOOKS = ("pixel", "semantic")
"""The two codebooks, in the order of a token's codes."""


class DualOutputs(NamedTuple):
    """Output of `DualModel`.

    Attributes:
        pixels: reconstructed images (B, 3, H, W), not clamped.
        semantic: weighted semantic loss, float32 scalar.
        commitment: weighted commitment loss, float32 scalar.
        distance: squared error of the reconstructed features alone, detached.
        codes: int64 (B, N, 2, R); None before quantization starts.
        stats: EMA statistics of the pixel and the semantic codebook; None where there is nothing to
            update.
    """

    pixels: Tensor
    semantic: Tensor
    commitment: Tensor
    distance: Tensor
    codes: Tensor | None
    stats: tuple[EMAStats | None, EMAStats | None]


class DualModel(nn.Module):
    """Trained tower with two residual quantizers and a pixel decoder.

    z_pix projects the weighted sum of the outputs of blocks `pixel_layers`; the decoder
    reconstructs the image from its codes. z_sem projects the hidden state h of `encoder.layer`; its
    codes reconstruct that state for the frozen layers after it. Semantic losses are ‖h − F0‖² and
    ‖reconstruction − F0‖² (means over elements), where F0 is the state of the initial encoder.
    Nothing is detached: the reconstruction loss reaches the blocks up to the last pixel layer, the
    semantic loss all blocks up to `encoder.layer`. With `semantic_weight` 0 the deep side is
    frozen.

    Raises:
        ConfigError: for layers that the tower does not have, or no layer after `encoder.layer`.
    """

    def __init__(self, stage: DualStage, encoder: VisionEncoder) -> None:
        super().__init__()
        self.stage = stage
        self.encoder = encoder
        self.depth = semantic_depth(stage, encoder)
        for trained in (encoder.tower.embeddings, encoder.tower.encoder.layers[: self.depth]):
            trained.requires_grad_(True)
        for block in encoder.tower.encoder.layers:
            block.self_attn.dropout = 0.0  # F0, the target, is computed without dropout
        config = VQ(
            stage.codes, stage.dim, stage.commitment, stage.decay, stage.eps, stage.restart_below
        )
        self.pixel_down = nn.Linear(encoder.dim, stage.dim)
        self.semantic_down = nn.Linear(encoder.dim, stage.dim)
        self.semantic_up = nn.Linear(stage.dim, encoder.dim)
        init_linear(self.semantic_up)
        self.pixel = ResidualQuantizer(config, stage.depth)
        self.semantic = ResidualQuantizer(config, stage.depth)
        self.decoder = PixelDecoder(encoder.image_size, encoder.grid, stage.decoder, (stage.dim,))

    def train(self, mode: bool = True) -> DualModel:
        """Set the mode of the tower too: activation checkpointing of its blocks needs train mode."""
        super().train(mode)
        self.encoder.tower.train(mode)
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.encoder.grid

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, for the adaptive GAN weight."""
        return self.decoder.last_layer

    def hidden(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of the pixel layers' outputs, and the hidden state of `encoder.layer`: both
        (B, N, C).
        """
        tower = self.encoder.tower
        weights = dict(zip(self.stage.pixel_layers, self.stage.pixel_weights, strict=True))
        x_BNC = tower.embeddings(pixels_BCHW)
        shallow: Tensor | None = None
        for number, block in enumerate(tower.encoder.layers[: self.depth], 1):
            x_BNC = block(x_BNC, None)
            if number in weights:
                part_BNC = weights[number] * x_BNC
                shallow = part_BNC if shallow is None else shallow + part_BNC
        assert shallow is not None
        return shallow, x_BNC

    def vectors(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors to quantize, z_pix and z_sem: both (B, N, D)."""
        shallow_BNC, deep_BNC = self.hidden(pixels_BCHW)
        return self.pixel_down(shallow_BNC), self.semantic_down(deep_BNC)

    def forward(
        self, pixels_BCHW: Tensor, target_BNC: Tensor, quantize: bool = True
    ) -> DualOutputs:
        """Reconstructions and losses, in float32.

        Args:
            target_BNC: F0, features of the initial encoder.
            quantize: False passes the vectors on without quantization.
        """
        shallow_BNC, deep_BNC = self.hidden(pixels_BCHW)
        z_pixel = self.pixel_down(shallow_BNC)
        z_semantic = self.semantic_down(deep_BNC)
        if quantize:
            pixel = self.pixel(z_pixel)
            semantic = self.semantic(z_semantic)
        else:
            zero = z_pixel.new_zeros((), dtype=torch.float32)
            pixel = Quantized(z_pixel, zero, zero, None)
            semantic = Quantized(z_semantic, zero, zero, None)
        distance = F.mse_loss(self.semantic_up(semantic.q).float(), target_BNC.float())
        kept = F.mse_loss(deep_BNC.float(), target_BNC.float())
        codes = torch.stack([pixel.ids, semantic.ids], -2) if quantize else None
        return DualOutputs(
            self.decoder(pixel.q),
            self.stage.semantic_weight * (distance + kept),
            pixel.loss + semantic.loss * float(self.stage.semantic_weight > 0),
            distance.detach(),
            codes,
            (pixel.stats, semantic.stats),
        )

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Codes of images (B, 3, H, W): int64 (B, N, 2, R), pixel before semantic."""
        z_pixel, z_semantic = self.vectors(pixels_BCHW)
        return torch.stack([self.pixel.assign(z_pixel), self.semantic.assign(z_semantic)], -2)

    def embed(self, codes_BN2R: Tensor) -> Tensor:
        """Vectors [ẑ_pix ; ẑ_sem] of codes (…, 2, R): float32 (…, 2·D)."""
        return torch.cat(
            [self.pixel.embed(codes_BN2R[..., 0, :]), self.semantic.embed(codes_BN2R[..., 1, :])],
            -1,
        )

    @torch.no_grad()
    def pooled(self, codes_BN2R: Tensor) -> Tensor:
        """Image embeddings of semantic codes: float32 (B, E).

        The layers after `encoder.layer` and the pooling head read the reconstructed features.
        """
        tower = self.encoder.tower
        x_BNC = self.semantic_up(self.semantic.embed(codes_BN2R[..., 1, :]))
        for block in tower.encoder.layers[self.depth :]:
            x_BNC = block(x_BNC, None)
        if not tower.use_head:
            raise ArtifactError(
                f"{self.encoder.source} has no pooling head (vision_use_head is false)."
            )
        return tower.head(tower.post_layernorm(x_BNC)).float()


def semantic_depth(stage: DualStage, encoder: VisionEncoder) -> int:
    """Number of blocks up to the hidden state of `encoder.layer`.

    Raises:
        ConfigError: if that layer or the pixel layers do not fit the tower.
    """
    layers = encoder.num_layers
    layer = encoder.layer
    depth = layer if layer >= 0 else layers + 1 + layer
    if layer == -1 or not 0 < depth < layers:
        raise ConfigError(
            f"encoder.layer={layer}, but DualToken quantizes a hidden state before the last of the encoder's {layers} "
            "blocks, which read its reconstruction. Set encoder.layer=-2 (the last block but one)."
        )
    if max(stage.pixel_layers) > depth or len(set(stage.pixel_layers)) != len(stage.pixel_layers):
        raise ConfigError(
            f"tokenizer.dual.pixel_layers={stage.pixel_layers}, expected distinct blocks from 1 to {depth}, the block of the "
            f"semantic codes (encoder.layer={layer} of {layers} blocks)."
        )
    return depth


class DualToken(SavedTokenizer):
    """The trained DualToken tokenizer: eval mode, no gradients, float32.

    On a CPU the same input gives the same bits.
    """

    system = SYSTEM

    def __init__(self, model: DualModel) -> None:
        super().__init__()
        self.model = model
        self.requires_grad_(False).eval()

    @property
    def num_codes(self) -> int:
        """K, the size of each codebook."""
        return self.model.stage.codes

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of a token's codes: (2, R), pixel before semantic."""
        return (len(BOOKS), self.model.stage.depth)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.model.grid

    @property
    def image_size(self) -> int:
        """Side of the images that `encode` takes and `decode` returns, in pixels."""
        return self.model.encoder.image_size

    @property
    def embed_splits(self) -> tuple[int, ...]:
        """Widths of the parts of a token's vector: (pixel, semantic)."""
        return (self.model.stage.dim,) * len(BOOKS)

    @property
    def has_semantic_only(self) -> bool:
        """There is no decoder for semantic codes."""
        return False

    @property
    def device(self) -> torch.device:
        """Device of the weights; inputs are moved there."""
        return self.model.pixel.codes.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of images (B, 3, S, S) in [-1, 1]: int64 (B, T, 2, R).

        Raises:
            DataError: for another shape, dtype or range, or NaN.
        """
        check_pixels(pixels, self.image_size)
        if not len(pixels):
            return torch.empty(
                0, self.num_tokens, *self.code_shape, dtype=torch.int64, device=self.device
            )
        return self.model.encode(pixels.to(self.device, torch.float32))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes (B, T, 2, R): float32 (B, 3, S, S) in [-1, 1].

        Only the pixel codes are decoded.

        Raises:
            VocabularyError: for codes that are not this tokenizer's.
        """
        codes = self._checked(codes, whole=True)
        if not len(codes):
            return torch.empty(0, 3, self.image_size, self.image_size, device=self.device)
        return self.model.decoder(self.model.pixel.embed(codes[..., 0, :])).float().clamp(-1, 1)

    def decode_semantic_only(self, codes: Tensor) -> Tensor:
        """DualToken has no decoder for semantic codes: always raises ConfigError."""
        raise ConfigError(
            "DualToken decodes its pixel codes alone; it has no decoder for semantic codes."
        )

    @torch.no_grad()
    def embed(self, codes: Tensor) -> Tensor:
        """Input vectors of a language model, [ẑ_pix ; ẑ_sem], for codes (…, 2, R): float32 (…, C)."""
        return self.model.embed(self._checked(codes, whole=False))

    @torch.no_grad()
    def pooled(self, codes: Tensor) -> Tensor:
        """Zero-shot image embeddings of codes (B, T, 2, R): float32 (B, E), not normalized."""
        return self.model.pooled(self._checked(codes, whole=True))

    def code_vectors(self) -> Tensor:
        """Both codebooks: float32 (2, K, D)."""
        return torch.stack([self.model.pixel.codes, self.model.semantic.codes])

    def _checked(self, codes: Tensor, whole: bool) -> Tensor:
        """Codes as int64 on the device; VocabularyError if they are not this tokenizer's."""
        grid = self.grid if whole else None
        return checked_codes(codes, self.num_codes, grid, self.code_shape).to(
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
            "code_shape": list(self.code_shape),
            "feature_dim": self.model.encoder.dim,
            "encoder_layer": self.model.encoder.layer,
            "embed_splits": list(self.embed_splits),
            "dual": self.model.stage.model_dump(mode="json"),
        }

    def _saved(self) -> tuple[Mapping[str, Tensor], VisionEncoder]:
        """The trained model and its tower."""
        return self.model.state_dict(), self.model.encoder

    @classmethod
    def _load(cls, config: Mapping[str, Any], folder: str, source: str) -> Self:
        try:
            stage = DualStage.model_validate(config["dual"])
            encoder = VisionEncoder.from_pretrained(
                os.path.join(folder, ENCODER_NAME), config["encoder_layer"]
            )
            model = DualModel(stage, encoder)
            tower = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
            model.load_state_dict(tower | load_file(os.path.join(folder, WEIGHTS_NAME)))
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise ArtifactError(
                f"{source}/{CONFIG_NAME} is not a DualToken config: {error!r}."
            ) from error
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ArtifactError(
                f"The weights in {source} are missing, damaged or do not fit its config: {error}. Save the tokenizer again."
            ) from error
        return cls(model)
