"""Settings that trade time for memory: offload, activation checkpointing, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from smalti.errors import ConfigError

if TYPE_CHECKING:
    from smalti.schema import Train


def offload(train: Train, stage: int) -> dict[str, object]:
    """DeepSpeed's `zero_optimization` keys for `train.offload`.

    Optimizer states are offloaded, and under ZeRO-3 the weights too. An engine without ZeRO (a
    GAN's discriminator) keeps both on its device.

    Raises:
        ConfigError: NVMe without a CUDA device.
    """
    if train.offload == "none" or stage == 0:
        return {}
    place: dict[str, object] = {"device": train.offload}
    if train.offload == "nvme":
        if not torch.cuda.is_available():
            raise ConfigError(
                "train.offload=nvme: no CUDA device is visible, and DeepSpeed's asynchronous file "
                "access is built for GPU nodes. Set train.offload=cpu or none."
            )
        place["nvme_path"] = train.offload_path
    place["pin_memory"] = torch.cuda.is_available()
    places: dict[str, object] = {"offload_optimizer": place}
    if stage == 3:
        places["offload_param"] = dict(place)
    return places


def spare_memory(module: nn.Module, train: Train) -> None:
    """Apply `train.activation_checkpointing` and `train.compile` to every transformer block.

    In place; the names of weights do not change.
    """
    if not (train.activation_checkpointing or train.compile):
        return
    for block in blocks_of(module):
        if train.compile:
            block.compile(dynamic=True)
        if train.activation_checkpointing:
            recompute(block)


def recompute(block: nn.Module) -> None:
    """Keep only the inputs of a block, and recompute it in the backward pass.

    The recomputation draws the same random numbers.
    """
    forward = block.forward
    checkpointed: Callable[..., object] = partial(checkpoint, forward, use_reentrant=False)

    def run(*args: object, **kwargs: object) -> object:
        recomputes = block.training and torch.is_grad_enabled()
        return checkpointed(*args, **kwargs) if recomputes else forward(*args, **kwargs)

    block.forward = run  # type: ignore[method-assign]


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks in a module: transformers' decoder and encoder layers, and ours."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from smalti.tokenizers.vit import Block

    return (
        layer for layer in module.modules() if isinstance(layer, Block | GradientCheckpointingLayer)
    )
