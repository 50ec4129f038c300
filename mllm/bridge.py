"""The mapping M_φ of UniCode²: code vectors → conditioning of a diffusion decoder (PAPERS §3).

Axes: B images, T codes of an image, C width of a code vector, L places of a prompt, E width of its
embedding, P width of its pooled embedding, M prompts of all workers, V codes.
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
SETTINGS = "bridge.json"
WEIGHTS = "bridge.safetensors"
CODES = "codes.safetensors"


class Shape(NamedTuple):
    """Sizes of both sides: T, C, L, E, and P (0: no pooled embedding)."""

    tokens: int
    code_width: int
    length: int
    width: int
    pooled: int


class Conditioning(NamedTuple):
    """The input of a diffusion decoder in place of a prompt.

    Attributes:
        sequence: prompt embeddings (B, L, E).
        pooled: pooled embeddings (B, P), if the decoder takes them.
    """

    sequence: Tensor
    pooled: Tensor | None

    def shape(self, tokens: int, code_width: int) -> Shape:
        """Sizes of a bridge from T codes of width C to this conditioning."""
        length, width = self.sequence.shape[1:]
        pooled = 0 if self.pooled is None else self.pooled.shape[-1]
        return Shape(tokens, code_width, length, width, pooled)


class Bridge(nn.Module):
    """A transformer over code vectors and learned queries.

    The queries are L, or L + 1 with a pooled embedding; their outputs are mapped to the
    conditioning.
    """

    def __init__(self, section: BridgeSection, shape: Shape) -> None:
        super().__init__()
        self.section = section
        self.shape = shape
        width = section.width
        self.inward = nn.Linear(shape.code_width, width)
        self.places = nn.Parameter(0.02 * torch.randn(shape.tokens, width))
        self.queries = nn.Parameter(0.02 * torch.randn(shape.length + bool(shape.pooled), width))
        self.body = Transformer(width, section.layers, section.heads)
        self.sequence = nn.Linear(width, shape.width)
        self.pooled = nn.Linear(width, shape.pooled) if shape.pooled else None

    def forward(self, vectors_BTC: Tensor) -> Conditioning:
        """Map code vectors to conditioning, float32 at any precision of training."""
        queries = self.queries.expand(len(vectors_BTC), -1, -1)
        inputs = self.inward(vectors_BTC)
        outputs = self.body(torch.cat([queries.to(inputs.dtype), inputs + self.places], 1))
        outputs = outputs[:, : queries.shape[1]]
        sequence = self.sequence(outputs[:, : self.shape.length]).float()
        if self.pooled is None:
            return Conditioning(sequence, None)
        return Conditioning(sequence, self.pooled(outputs[:, -1]).float())


class BridgeLoss(nn.Module):
    """A bridge and its loss.

    The loss is InfoNCE of each image's conditioning among the prompts of all workers, plus the
    squared error to that of its own prompt.
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
        """Mean loss over the images of this worker, and metrics.

        Args:
            vectors_BTC: vectors of the images' codes.
            wanted: conditioning of the images' own prompts, frozen.
            prompts_BL: token ids of these prompts, to find equal prompts.
            gather: maps this worker's rows to those of all workers, in order (default: one worker).
            first: index of this worker's first row among all.

        Returns:
            The loss, and its parts `info_nce`, `squared_error` and `retrieval` (share of images
            whose own prompt is the nearest), detached.
        """
        found: Conditioning = self.bridge(vectors_BTC)
        section = self.bridge.section
        every = gather or (lambda rows: rows)
        same_BM = (prompts_BL[:, None] == every(prompts_BL)[None]).all(-1)
        pairs = [(found.sequence, wanted.sequence)]
        if found.pooled is not None and wanted.pooled is not None:
            pairs.append((found.pooled[:, None], wanted.pooled[:, None]))
        losses = []
        errors = []
        hits = []
        for found_BLE, wanted_BLE in pairs:
            all_MLE = every(wanted_BLE.contiguous())
            loss, hit = info_nce(found_BLE, all_MLE, same_BM, first, section.temperature)
            losses.append(loss)
            hits.append(hit)
            errors.append(F.mse_loss(found_BLE, wanted_BLE))
        nce = torch.stack(losses).mean()
        error = torch.stack(errors).mean()
        total = nce + section.regression * error
        metrics = {
            "loss": total,
            "info_nce": nce,
            "squared_error": error,
            "retrieval": torch.stack(hits).mean(),
        }
        return total, {name: value.detach() for name, value in metrics.items()}


def info_nce(
    found_BLE: Tensor, wanted_MLE: Tensor, same_BM: Tensor, first: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE by cosine: cross entropy of each image's own prompt among all.

    Args:
        found_BLE: conditioning that the bridge gave.
        wanted_MLE: that of all prompts; image b's own is row `first` + b.
        same_BM: prompts with the same text as the image's own; they are no negatives.
        first: see `wanted_MLE`.
        temperature: divides the cosines.

    Returns:
        The mean over images and places, and the share of images whose own prompt is the nearest
        over all places; both 0-d.
    """
    found_BLE = F.normalize(found_BLE.float(), dim=-1)
    wanted_MLE = F.normalize(wanted_MLE.float(), dim=-1)
    logits_LBM = torch.einsum("ble,mle->lbm", found_BLE, wanted_MLE) / temperature
    own_B = first + torch.arange(len(found_BLE), device=found_BLE.device)
    ignored_BM = same_BM.clone()
    ignored_BM[torch.arange(len(own_B), device=own_B.device), own_B] = False
    logits_LBM = logits_LBM.masked_fill(ignored_BM, -torch.inf)
    loss = F.cross_entropy(logits_LBM.flatten(0, 1), own_B.repeat(len(logits_LBM)))
    return loss, (logits_LBM.mean(0).argmax(-1) == own_B).float().mean()


def save_bridge(folder: str, bridge: Bridge, state: dict[str, Tensor] | None = None) -> None:
    """Write a bridge into a local folder; the settings are written last.

    Args:
        folder: holds the code vectors (`CODES`) already.
        bridge: the bridge.
        state: its state dict (default: its own).
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
    """Load a bridge and the code vectors that it reads.

    Returns:
        The bridge, frozen, on the CPU; and the code vectors (V, C), memory-mapped.

    Raises:
        ArtifactError: if the folder is incomplete.
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
            f"{folder} holds no complete bridge ({error!r}). Run `smalti bridge RECIPE` again."
        ) from error
    return bridge.requires_grad_(False).eval(), codes_VC
