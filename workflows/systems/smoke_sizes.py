"""Overrides of `--smoke` that systems share."""

from __future__ import annotations

from smalti.schema import Loss, Train
from smalti.storage import exists

STEPS = 3
TRAIN = {
    "steps": STEPS,
    "batch_size": 4,
    "micro_batch_size": None,
    "warmup": 0,
    "checkpoint_every": 2,
    "log_every": 1,
}
VIT = {"dim": 16, "layers": 1, "heads": 2}


def train(section: str, recipe_train: Train) -> dict[str, object]:
    """Overrides of a training section: few steps.

    A recipe with gradient accumulation keeps it.
    """
    values: dict[str, object] = {f"{section}.{key}": value for key, value in TRAIN.items()}
    if recipe_train.micro_batch_size:
        values[f"{section}.micro_batch_size"] = 2
    return values


def loss(section: str, wanted: Loss) -> dict[str, object]:
    """Overrides of a loss: a GAN that starts within the few steps.

    LPIPS without a weights file becomes the encoder's features.
    """
    values: dict[str, object] = {f"{section}.gan.channels": 8, f"{section}.gan.layers": 1}
    if wanted.gan.weight:
        values[f"{section}.gan.start_step"] = 1
    if wanted.perceptual.kind == "lpips" and not (
        wanted.perceptual.weights and exists(wanted.perceptual.weights)
    ):
        values[f"{section}.perceptual.kind"] = "encoder"
    return values


def vit(section: str) -> dict[str, object]:
    """Overrides of a vision transformer's sizes."""
    return {f"{section}.{key}": value for key, value in VIT.items()}
