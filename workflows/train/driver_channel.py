"""What rank 0 tells the driver.

A light module of its own: the actor's process need not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from smalti.errors import SmaltiError


class DriverChannel:
    """Actor between rank 0, the driver and what decides on the number of workers: numbers and
    pictures to log, the error that ends the run, and the wish for a checkpoint.
    """

    def __init__(self) -> None:
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._pictures: list[tuple[int, str, np.ndarray]] = []
        self._started: list[tuple[int, int]] = []
        self._failed: list[str] = []
        self._lines: list[str] = []
        self._fatal: SmaltiError | None = None
        self._wished = self._saved = False

    def metrics(self, step: int, numbers: dict[str, float]) -> None:
        self._metrics.append((step, numbers))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._pictures.append((step, name, picture))

    def started(self, step: int, workers: int) -> None:
        """So many workers are ready and go on after `step` steps; said again by a restarted group."""
        self._started.append((step, workers))

    def failed(self, line: str) -> None:
        """Why workers start again; "" where it is for the user to fix, who sees it at the end."""
        self._failed += [line] if line else []

    def say(self, line: str) -> None:
        """A line for the person who watches."""
        self._lines.append(line)

    def fail(self, error: SmaltiError) -> None:
        self._fatal = self._fatal or error

    def fatal(self) -> SmaltiError | None:
        return self._fatal

    def may_restart(self) -> bool:
        """True once a checkpoint was made since this was first asked: more workers can start from
        it.
        """
        saved = self._saved
        self._wished, self._saved = not saved, False
        return saved

    def checkpoint_requested(self) -> bool:
        """Whether more workers wait for a checkpoint to start from."""
        return self._wished

    def saved(self) -> None:
        """The checkpoint that was wished for stands."""
        self._wished, self._saved = False, True

    def take(self) -> tuple[list[Any], list[Any], list[tuple[int, int]], list[str]]:
        """Everything since the last call, but for failures."""
        taken = (self._metrics, self._pictures, self._started, self._lines)
        self._metrics, self._pictures, self._started, self._lines = [], [], [], []
        return taken

    def take_failures(self) -> list[str]:
        """Why workers start again, since the last call."""
        taken, self._failed = self._failed, []
        return taken
