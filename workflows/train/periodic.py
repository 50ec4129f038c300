"""Something that all workers do together about once in so many seconds, in the same steps."""

from __future__ import annotations

import time

import torch

from smalti.workflows.train.collectives import Collectives

MOST = 1000  # steps between two times


class Periodic:
    """`due(step)` is true about every `seconds`, on every worker in the same steps: worker 0 tells,
    each time, after how many steps the next one is, by how long its last steps took.
    """

    def __init__(self, seconds: float, collectives: Collectives, device: torch.device) -> None:
        self.seconds, self.collectives, self.device = seconds, collectives, device
        self._last = (0, time.monotonic())
        self._next = 0

    def due(self, step: int) -> bool:
        """Whether it is time; to be called with each step, rising."""
        if step < self._next:
            return False
        (last, then), now = self._last, time.monotonic()
        each_s = (now - then) / max(1, step - last)
        wanted = max(1, min(MOST, int(self.seconds / max(each_s, 1e-9))))
        self._next = step + self.collectives.broadcast_object(wanted, self.device)
        self._last = (step, now)
        return True
