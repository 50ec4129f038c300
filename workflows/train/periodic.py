"""Work that all workers do together about once in so many seconds, in the same steps."""

from __future__ import annotations

import time

import torch

from smalti.workflows.train.collectives import Collectives

MOST = 1000
"""Most steps between two times."""


class Periodic:
    """Decides in which steps to do something, on every worker in the same ones.

    Each time, worker 0 computes from the duration of its last steps after how many steps the next
    time is.

    Args:
        seconds: about how far the times are apart.
        collectives: of the workers.
        device: for what they send each other.
    """

    def __init__(self, seconds: float, collectives: Collectives, device: torch.device) -> None:
        self.seconds = seconds
        self.collectives = collectives
        self.device = device
        self._last_step = 0
        self._last_time = time.monotonic()
        self._next = 0

    def due(self, step: int) -> bool:
        """Whether it is time; call it with each step, ascending."""
        if step < self._next:
            return False
        now = time.monotonic()
        each_s = (now - self._last_time) / max(1, step - self._last_step)
        wanted = max(1, min(MOST, int(self.seconds / max(each_s, 1e-9))))
        self._next = step + self.collectives.broadcast_object(wanted, self.device)
        self._last_step = step
        self._last_time = now
        return True
