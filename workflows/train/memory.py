"""What trades time for memory in a training run: offload, activations computed again, compiled
blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from smalti.errors import ConfigError

if TYPE_CHECKING:
    from smalti.schema import Train


def offload(train: Train, stage: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` keys for `train.offload`: optimizer states, and under ZeRO-3
    the weights too.

    An engine without ZeRO (a GAN's discriminator) stays where it is. ConfigError: NVMe without a
    GPU build.
    """
    if train.offload == "none" or stage == 0:
        return {}
    place: dict[str, Any] = {"device": train.offload}
    if train.offload == "nvme":
        if not torch.cuda.is_available():
            raise ConfigError(
                "train.offload=nvme: no CUDA device is in sight, and DeepSpeed's asynchronous file access is built for GPU "
                "machines. Set train.offload=cpu or none."
            )
        place["nvme_path"] = train.offload_path
    places = {"offload_optimizer": place | {"pin_memory": torch.cuda.is_available()}}
    return places | (
        {"offload_param": place | {"pin_memory": torch.cuda.is_available()}} if stage == 3 else {}
    )


def spare_memory(module: nn.Module, train: Train) -> None:
    """`train.activation_checkpointing` and `train.compile` on every transformer block, in place;
    names of weights stay.
    """
    for block in blocks_of(module) if train.activation_checkpointing or train.compile else ():
        if train.compile:
            block.compile(dynamic=True)
        if train.activation_checkpointing:
            recompute(block)


def recompute(block: nn.Module) -> None:
    """Keep only the inputs of a block, and run it again on the way back (with the same random
    numbers).
    """
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = run  # type: ignore[method-assign]


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks in a module: transformers' decoder and encoder layers, and ours."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from smalti.tokenizers.vit import Block

    return (
        part for part in module.modules() if isinstance(part, Block | GradientCheckpointingLayer)
    )
