"""Collectives over the training workers, passed into plain PyTorch code.

With one worker each is the identity.

Legend: W workers, B rows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from smalti.errors import SmaltiError

PATIENCE = timedelta(hours=12)
"""How long workers wait for each other's reading and writing of storage.

All other collectives have torch's timeout of half an hour.
"""

T = TypeVar("T")


class Collectives:
    """Collectives of the default process group; tensors keep their device and dtype.

    `rank` and `world_size` are those of `torch.distributed`, or of one worker where it is not
    initialised. Every worker creates one at the same time: the first of a process creates the group
    that waits for storage.
    """

    def __init__(self) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if ready else 0
        self.world_size = dist.get_world_size() if ready else 1
        self._patient: dist.ProcessGroup | None = None
        if dist.group.WORLD is not None and self.world_size > 1:
            self._patient = patient_group(dist.group.WORLD)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, the same on all."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows (B, …) of all workers in rank order (W·B, …); B may differ between workers."""
        if self.world_size == 1:
            return rows
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        sizes = counts.tolist()
        padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The source's tensor, on every worker."""
        if self.world_size == 1:
            return tensor
        copy = tensor.clone().contiguous()
        dist.broadcast(copy, source)
        return copy

    def broadcast_object(self, value: T, device: torch.device) -> T:
        """The first worker's value (anything that pickles), on every worker."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=device)
        return box[0]

    def once_per_node(self, work: Callable[[], T]) -> T:
        """Run `work` on the first worker of each node; every worker calls it.

        The workers of a node have consecutive ranks, as Ray and torchrun assign them.

        Returns:
            What `work()` returned on this node; it must pickle.

        Raises:
            Exception: what `work()` raised on any node, on all workers.
        """
        if self.world_size == 1:
            return work()
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        own: tuple[T | None, Exception | None] = (None, None)
        if local == 0:
            try:
                own = (work(), None)
            except SmaltiError as error:  # raised below, by all
                own = (None, error)
            except Exception as error:
                own = (None, RuntimeError(f"{error!r}"))
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, own, group=self._patient)
        for _, wrong in found:
            if wrong is not None:
                raise wrong
        return found[self.rank - local][0]

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()

    def storage_barrier(self) -> None:
        """Wait for all workers up to `PATIENCE`, after some of them read or wrote storage.

        A worker that died is noticed at once all the same, by its closed connection and by Ray.
        """
        if self.world_size > 1:
            dist.barrier(group=self._patient)


@functools.cache
def patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group over all workers whose collectives wait up to `PATIENCE`; every worker calls it."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
