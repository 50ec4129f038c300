"""Collectives over the training workers, handed into plain PyTorch code; with one worker each is
the identity.

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
"""How long workers wait for one another's reading and writing of storage; for all else, torch's
half hour.
"""

T = TypeVar("T")


class Collectives:
    """Collectives of the default process group; tensors keep their device and dtype.

    `rank` and `world_size` default to those of `torch.distributed`, or to one worker when it is not
    initialised. Every worker makes one alike: the first of a process opens the group that waits for
    storage.
    """

    def __init__(self) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if ready else 0
        self.world_size = dist.get_world_size() if ready else 1
        self._patient = patient_group(dist.group.WORLD) if self.world_size > 1 else None

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

    def broadcast_object(self, value: Any, device: torch.device) -> Any:
        """The first worker's value (anything that pickles), on every worker."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=device)
        return box[0]

    def once_a_machine(self, work: Callable[[], T]) -> T:
        """What `work()` returns on the first worker of this machine (it must pickle), on every
        worker of it; what it raises anywhere, all workers raise.

        The workers of a machine have successive ranks, as Ray and torchrun number them.
        """
        if self.world_size == 1:
            return work()
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        found: tuple[Any, Exception | None] = (None, None)
        if local == 0:
            try:
                found = (work(), None)
            except Exception as error:  # raised below, by all
                found = (
                    None,
                    error if isinstance(error, SmaltiError) else RuntimeError(f"{error!r}"),
                )
        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, found, group=self._patient)
        for _, wrong in told:
            if wrong is not None:
                raise wrong
        return told[self.rank - local][0]

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()

    def storage_barrier(self) -> None:
        """Wait for all workers as long as `PATIENCE`, after what each or one of them read from
        storage or wrote there.

        One that died is seen at once all the same, by its closed connection and by Ray.
        """
        if self.world_size > 1:
            dist.barrier(group=self._patient)


@functools.cache
def patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group over all workers of `world` whose collectives wait as long as `PATIENCE`; every
    worker calls it.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)
