"""The mapping M_φ of UniCode²: from the vectors of an image's codes to the conditioning of a
diffusion decoder (PAPERS §3).

Axes: B images, T codes of an image, C width of a code vector, L places of a prompt, E width of its
embedding, P of its pooled embedding, M prompts of all workers, V codes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.errors import ArtifactError
from smalti.schema import BridgeSection
from smalti.tokenizers.vit import Transformer

FORMAT = 1
SETTINGS, WEIGHTS, CODES = "bridge.json", "bridge.safetensors", "codes.safetensors"


class Shape(NamedTuple):
    """Sizes of both sides: T codes of width C; L places of width E, and P (0: none)."""

    tokens: int
    code_width: int
    length: int
    width: int
    pooled: int


class Conditioning(NamedTuple):
    """What a diffusion decoder receives: prompt embeddings (B, L, E), and pooled ones (B, P) where
    it wants them.
    """

    sequence: Tensor
    pooled: Tensor | None

    def shape(self, tokens: int, code_width: int) -> Shape:
        """Sizes of a bridge to it from so many codes of this width."""
        length, width = self.sequence.shape[1:]
        return Shape(
            tokens, code_width, length, width, 0 if self.pooled is None else self.pooled.shape[-1]
        )


class Bridge(nn.Module):
    """A transformer over an image's code vectors and L (with a pooled embedding L + 1) learned
    queries, whose outputs are mapped to the conditioning.
    """

    def __init__(self, section: BridgeSection, shape: Shape) -> None:
        super().__init__()
        self.section, self.shape, width = section, shape, section.width
        self.inward = nn.Linear(shape.code_width, width)
        self.places = nn.Parameter(0.02 * torch.randn(shape.tokens, width))
        self.queries = nn.Parameter(0.02 * torch.randn(shape.length + bool(shape.pooled), width))
        self.body = Transformer(width, section.layers, section.heads)
        self.sequence = nn.Linear(width, shape.width)
        self.pooled = nn.Linear(width, shape.pooled) if shape.pooled else None

    def forward(self, vectors_BTC: Tensor) -> Conditioning:
        """Float32 whatever the precision of training."""
        queries = self.queries.expand(len(vectors_BTC), -1, -1)
        seen = self.inward(vectors_BTC)
        found = self.body(torch.cat([queries.to(seen.dtype), seen + self.places], 1))[
            :, : queries.shape[1]
        ]
        sequence = self.sequence(found[:, : self.shape.length]).float()
        return Conditioning(
            sequence, None if self.pooled is None else self.pooled(found[:, -1]).float()
        )


class BridgeLoss(nn.Module):
    """A bridge with what it learns by: InfoNCE of each image's conditioning among the prompts of
    all workers, and the squared error to its own prompt's.
    """

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self.bridge = bridge

    def forward(
        self,
        vectors_BTC: Tensor,
        wanted: Conditioning,
        prompts_BL: Tensor,
        gather: Callable[[Tensor], Tensor] | None = None,
        first: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the images of this worker, and its parts.

        wanted: of the images' own prompts, frozen. prompts_BL: their token ids, by which equal
        prompts are known. gather: rows of all workers in order; `first`: the place of this worker's
        first row among them.
        """
        found, section = self.bridge(vectors_BTC), self.bridge.section
        every = gather or (lambda rows: rows)
        same_BM = (prompts_BL[:, None] == every(prompts_BL)[None]).all(-1)
        losses, errors, hits = [], [], []
        for mine, own in zip(found, wanted, strict=True):
            if mine is not None and own is not None:
                mine, own = (x if x.ndim == 3 else x[:, None] for x in (mine, own))
                loss, hit = info_nce(
                    mine, every(own.contiguous()), same_BM, first, section.temperature
                )
                losses.append(loss)
                hits.append(hit)
                errors.append(F.mse_loss(mine, own))
        nce, error = torch.stack(losses).mean(), torch.stack(errors).mean()
        total = nce + section.regression * error
        told = {
            "loss": total,
            "info_nce": nce,
            "squared_error": error,
            "retrieval": torch.stack(hits).mean(),
        }
        return total, {name: value.detach() for name, value in told.items()}


def info_nce(
    found_BLE: Tensor, wanted_MLE: Tensor, same_BM: Tensor, first: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each image's own prompt (row `first` + b) among all by cosine, a mean over
    images and places; the share of images whose own is the nearest over all places.

    same_BM: prompts that are the image's own, word for word; the others among them than its own are
    no negatives.
    """
    found_BLE, wanted_MLE = (
        F.normalize(found_BLE.float(), dim=-1),
        F.normalize(wanted_MLE.float(), dim=-1),
    )
    logits_LBM = torch.einsum("ble,mle->lbm", found_BLE, wanted_MLE) / temperature
    own_B = first + torch.arange(len(found_BLE), device=found_BLE.device)
    left_out_BM = same_BM.clone()
    left_out_BM[torch.arange(len(own_B), device=own_B.device), own_B] = False
    logits_LBM = logits_LBM.masked_fill(left_out_BM, -torch.inf)
    loss = F.cross_entropy(logits_LBM.flatten(0, 1), own_B.repeat(len(logits_LBM)))
    return loss, (logits_LBM.mean(0).argmax(-1) == own_B).float().mean()


def save_bridge(folder: str, bridge: Bridge, state: dict[str, Tensor] | None = None) -> None:
    """Write a bridge into a local folder beside its codes (`CODES`, which stand there); the
    settings come last.
    """
    state = bridge.state_dict() if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
    settings = {
        "format": FORMAT,
        "shape": list(bridge.shape),
        "bridge": bridge.section.model_dump(mode="json"),
    }
    with open(os.path.join(folder, SETTINGS), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2)


def load_bridge(folder: str) -> tuple[Bridge, Tensor]:
    """A saved bridge, frozen on the CPU, and the code vectors (V, C) that it reads, mapped from
    their file.

    ArtifactError: not whole.
    """
    try:
        with open(os.path.join(folder, SETTINGS), encoding="utf-8") as file:
            settings: dict[str, Any] = json.load(file)
        if settings["format"] != FORMAT:
            raise ValueError(f"format {settings['format']}, and this version reads {FORMAT}")
        bridge = Bridge(BridgeSection.model_validate(settings["bridge"]), Shape(*settings["shape"]))
        bridge.load_state_dict(load_file(os.path.join(folder, WEIGHTS)))
        codes_VC = load_file(os.path.join(folder, CODES))["codes"]
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder} holds no whole bridge ({error!r}). Run `smalti bridge RECIPE` again."
        ) from error
    return bridge.requires_grad_(False).eval(), codes_VC
