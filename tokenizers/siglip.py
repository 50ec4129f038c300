"""SigLIP trained from random weights, and its sigmoid loss (arXiv 2303.15343).

Axis letters: B images of this rank, G images or texts of all ranks, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel

from smalti.errors import ConfigError
from smalti.schema import EncoderTrain
from smalti.tokenizers.vit import sincos_positions

START_SCALE = math.log(10.0)
START_BIAS = -10.0


def build_siglip(
    config: EncoderTrain, image_size: int, vocab_size: int, pad_token_id: int, eos_token_id: int
) -> SiglipModel:
    """A SiglipModel of these sizes with random weights (torch's global seed).

    Scale t′ = log 10 and bias −10 as in the paper. Positions are initialized with 2-D sine-cosine
    codes: a small model that has to learn which patches are neighbours recognizes colours, but for
    a long time no shapes.

    Raises:
        ConfigError: for sizes that do not divide.
    """
    if image_size % config.patch_size:
        raise ConfigError(
            f"corpus.image_size={image_size} is not a multiple of encoder.train.patch_size={config.patch_size}. Change one of them."
        )
    if config.hidden_size % config.heads:
        raise ConfigError(
            f"encoder.train.hidden_size={config.hidden_size} is not a multiple of encoder.train.heads={config.heads}. Change one of them."
        )
    both = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_ratio * config.hidden_size,
        "num_attention_heads": config.heads,
        "attention_dropout": config.dropout,
    }
    vision = {
        "num_hidden_layers": config.layers,
        "image_size": image_size,
        "patch_size": config.patch_size,
    }
    text = {
        "num_hidden_layers": config.text_layers,
        "vocab_size": vocab_size,
        "max_position_embeddings": config.text_length,
        "pad_token_id": pad_token_id,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "projection_size": config.hidden_size,
    }
    model = SiglipModel(SiglipConfig(vision_config=both | vision, text_config=both | text))
    with torch.no_grad():
        model.logit_scale.fill_(START_SCALE)
        model.logit_bias.fill_(START_BIAS)
        side = image_size // config.patch_size
        positions = model.vision_model.embeddings.position_embedding.weight
        positions.copy_(sincos_positions((side, side), config.hidden_size))
    return model


def siglip_loss(
    image_BE: Tensor,
    text_GE: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    same_caption_BG: Tensor,
) -> Tensor:
    """Sigmoid loss −Σ log σ(±(t·x·y + b)) / B of unit embeddings: float32 scalar.

    Args:
        same_caption_BG: positive pairs; a caption that repeats in the batch is positive for each of
            its images.
    """
    logits_BG = (
        image_BE.float() @ text_GE.float().T * logit_scale.float().exp() + logit_bias.float()
    )
    signs_BG = same_caption_BG.to(logits_BG.dtype) * 2 - 1
    return -F.logsigmoid(signs_BG * logits_BG).sum() / len(image_BE)


def same_rows(a_BL: Tensor, b_GL: Tensor) -> Tensor:
    """Which rows of token ids are equal: bool (B, G)."""
    return (a_BL[:, None] == b_GL[None]).all(-1)


class ContrastiveModel(nn.Module):
    """A SiglipModel with its loss."""

    def __init__(self, model: SiglipModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixels_BCHW: Tensor,
        input_ids_BL: Tensor,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch of image-text pairs.

        Args:
            gather: concatenates a detached (B, …) tensor of all ranks, in rank order, to (G, …); B
                is equal on all
                ranks. Gradients averaged over ranks then equal those of the whole batch on one
                    rank: a rank's images
                are compared with all texts, its texts with all images, and gradients reach its own
                only.
        """
        image_BE = F.normalize(
            self.model.vision_model(pixel_values=pixels_BCHW).pooler_output.float(), dim=-1
        )
        text_BE = self._text(input_ids_BL)
        scale = self.model.logit_scale
        bias = self.model.logit_bias
        if gather is None:
            same = same_rows(input_ids_BL, input_ids_BL)
            loss = siglip_loss(image_BE, text_BE, scale, bias, same)
        else:
            ids_GL = gather(input_ids_BL)
            same = same_rows(input_ids_BL, ids_GL)
            loss = siglip_loss(image_BE, gather(text_BE.detach()), scale, bias, same)
            mirrored = siglip_loss(
                text_BE, gather(image_BE.detach()), scale.detach(), bias.detach(), same
            )
            loss = loss + mirrored - mirrored.detach()
        with torch.no_grad():
            right = same_rows(input_ids_BL, input_ids_BL)
            best_B = (image_BE @ text_BE.T).argmax(-1)
            hit = right[torch.arange(len(best_B), device=best_B.device), best_B].float().mean()
        metrics = {
            "loss": loss.detach(),
            "match": hit,
            "scale": scale.detach().exp().mean(),
            "bias": bias.detach().mean(),
        }
        return loss, metrics

    def _text(self, input_ids_BL: Tensor) -> Tensor:
        """Unit embeddings (B, E) of texts; repeated texts are embedded once."""
        unique_UL, places_B = input_ids_BL.unique(dim=0, return_inverse=True)
        return F.normalize(
            self.model.text_model(input_ids=unique_UL).pooler_output.float(), dim=-1
        )[places_B]
