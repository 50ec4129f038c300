"""The device of an actor."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from smalti.errors import ConfigError
from smalti.schema import Resources

if TYPE_CHECKING:
    import torch


def actor_device(resources: Resources) -> torch.device:
    """The actor's device.

    On a CPU, torch is limited to the actor's share of the cores.

    Raises:
        ConfigError: if a GPU is requested and torch sees none.
    """
    import torch

    if resources.gpus_per_worker and resources.device == "auto":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"resources.gpus_per_worker={resources.gpus_per_worker:g}, but torch "
                f"{torch.__version__} sees no GPU on {socket.gethostname()}. Install a torch with "
                "CUDA and a driver there, set resources.gpus_per_worker=0, or "
                "resources.device=cpu to try the layout without GPUs."
            )
        return torch.device("cuda")
    torch.set_num_threads(resources.cpus_per_worker)
    return torch.device("cpu")
