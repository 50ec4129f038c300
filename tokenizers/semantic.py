"""SemHiTok's semantic codebook (stage S of arXiv 2503.06764; VQ-KD of BEiT-2).

Axis letters: B batch, N tokens, C feature width, D code width, K codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.schema import SemanticStage
from smalti.tokenizers.losses import distill_loss
from smalti.tokenizers.quantizers import (
    QUANTIZERS,
    VQ,
    AllReduce,
    EMAStats,
    Quantizer,
    identity,
    presence,
)
from smalti.tokenizers.vit import Transformer, init_linear, sincos_positions


class SemanticTokenizer(nn.Module):
    """Vector-quantized autoencoder of a frozen encoder's features.

    Projection, quantizer, self-attention decoder. The loss is the distillation loss (cosine or L2)
    of the reconstructed features plus the quantizer's loss.

    Attributes:
        grid: rows and columns of patches; None is a square.
        ids: codes of the last forward, int64 (B, N).
    """

    ids: Tensor | None = None

    def __init__(
        self,
        feature_dim: int,
        stage: SemanticStage,
        num_codes: int,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.stage = stage
        self.num_codes = num_codes
        self.grid = grid
        self.proj = nn.Linear(feature_dim, stage.dim)
        self.quantizer: Quantizer = QUANTIZERS[stage.vq](
            VQ(num_codes, stage.dim, stage.beta, stage.decay, stage.eps, stage.restart_below)
        )
        self.expand = nn.Linear(stage.dim, stage.decoder_dim)
        self.body = Transformer(stage.decoder_dim, stage.decoder_layers, stage.decoder_heads)
        self.head = nn.Linear(stage.decoder_dim, feature_dim)
        for linear in (self.expand, self.head):
            init_linear(linear)

    @property
    def codes(self) -> Tensor:
        """The semantic codebook: float32 (K, D)."""
        return self.quantizer.effective_codes()

    def project(self, features_BNC: Tensor) -> Tensor:
        """(…, C) → (…, D), in the projection's precision."""
        return self.proj(features_BNC.to(self.proj.weight.dtype))

    @torch.no_grad()
    def encode(self, features_BNC: Tensor) -> Tensor:
        """Semantic code of every patch: int64 (…) in [0, K)."""
        return self.quantizer.assign(self.project(features_BNC))

    def reconstruct(self, q_BND: Tensor) -> Tensor:
        """Features reconstructed from code vectors: (B, N, D) → (B, N, C)."""
        x = self.expand(q_BND.to(self.expand.weight.dtype))
        positions = sincos_positions(self.grid or _square(x.shape[1]), x.shape[-1], x.device)
        return self.head(self.body(x + positions.to(x.dtype)))

    def forward(self, features_BNC: Tensor) -> tuple[Tensor, dict[str, Tensor], EMAStats | None]:
        """Loss, detached metrics, and the statistics for `after_step` (None unless it needs them)."""
        quantized = self.quantizer(self.project(features_BNC))
        self.ids = quantized.ids
        rebuilt_BNC = self.reconstruct(quantized.q)
        distill = distill_loss(rebuilt_BNC, features_BNC, self.stage.distill)
        loss = distill + quantized.loss
        with torch.no_grad():
            cosine = F.cosine_similarity(rebuilt_BNC.float(), features_BNC.float(), dim=-1).mean()
        metrics = {
            "loss": loss.detach(),
            "distill": distill.detach(),
            "vq": quantized.loss.detach(),
            "cosine": cosine,
            "codes_in_batch": presence(quantized.ids, self.num_codes).sum(),
        }
        return loss, metrics, quantized.stats

    def after_step(
        self,
        stats: EMAStats | None,
        all_reduce: AllReduce = identity,
        generator: torch.Generator | None = None,
        rank: int = 0,
    ) -> int:
        """Update the codebook after the optimizer's step (see `EMAQuantizer.update`).

        Args:
            stats: of the whole step; merge those of micro batches with `EMAStats.merge`.

        Returns:
            Number of codes restarted.
        """
        if stats is None:
            return 0
        return self.quantizer.update(stats, all_reduce, generator, rank)

    @torch.no_grad()
    def init_from(self, centroids_KC: Tensor) -> None:
        """Initialize projection and codebook from k-means centroids of the features (K, C).

        The projection is the PCA of the centroids, scaled so that the projected centroids, which
        become the codes, have a mean square of 1 per channel: the commitment weight then means the
        same for every encoder. For D > C the C directions are embedded isometrically, so that no
        channel is dead. Signs are fixed.

        Raises:
            ValueError: for another shape, NaN or Inf.
        """
        if tuple(centroids_KC.shape) != (self.num_codes, self.feature_dim):
            raise ValueError(
                f"centroids of shape {tuple(centroids_KC.shape)}, expected {(self.num_codes, self.feature_dim)}"
            )
        if not bool(torch.isfinite(centroids_KC).all()):
            raise ValueError("centroids hold NaN or Inf")
        weight_DC, bias_D = pca_projection(centroids_KC, self.stage.dim)
        codes_KD = F.linear(centroids_KC.to(weight_DC), weight_DC, bias_D)
        scale = codes_KD.square().mean().clamp(min=1e-12).rsqrt()
        self.proj.weight.copy_(weight_DC * scale)
        self.proj.bias.copy_(bias_D * scale)
        self.quantizer.set_codes(codes_KD * scale)


def pca_projection(x_KC: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weight (dim, C) and bias (dim,) of a PCA projection that removes the mean; float32."""
    x_KC = x_KC.double()
    mean_C = x_KC.mean(0)
    centred_KC = x_KC - mean_C
    _, vectors_CC = torch.linalg.eigh(centred_KC.T @ centred_KC)
    weight_DC = vectors_CC.flip(-1).T[:dim]
    largest = weight_DC.abs().argmax(-1, keepdim=True)
    weight_DC = weight_DC * weight_DC.gather(-1, largest).sign()
    if dim > len(weight_DC):
        generator = torch.Generator().manual_seed(0)
        spread = torch.randn(dim, len(weight_DC), generator=generator, dtype=torch.float64)
        weight_DC = torch.linalg.qr(spread).Q.to(weight_DC.device) @ weight_DC
    return weight_DC.float(), -(weight_DC @ mean_C).float()


def _square(num_tokens: int) -> tuple[int, int]:
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"{num_tokens} tokens are not a square: pass the grid to the tokenizer")
    return side, side
