"""What rank 0 tells the driver. A light module of its own: the actor's process need not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from smalti.errors import SmaltiError


class Board:
    """Actor between rank 0 and the driver: numbers and pictures to log, and the error that ends the run."""

    def __init__(self) -> None:
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._pictures: list[tuple[int, str, np.ndarray]] = []
        self._started: list[tuple[int, int]] = []
        self._lines: list[str] = []
        self._fatal: SmaltiError | None = None

    def metrics(self, step: int, numbers: dict[str, float]) -> None:
        self._metrics.append((step, numbers))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._pictures.append((step, name, picture))

    def started(self, step: int, workers: int) -> None:
        """So many workers are ready and go on after `step` steps; said again by a restarted group."""
        self._started.append((step, workers))

    def say(self, line: str) -> None:
        """A line for the person who watches."""
        self._lines.append(line)

    def fail(self, error: SmaltiError) -> None:
        self._fatal = self._fatal or error

    def fatal(self) -> SmaltiError | None:
        return self._fatal

    def take(self) -> tuple[list[Any], list[Any], list[tuple[int, int]], list[str]]:
        """Everything since the last call."""
        taken = (self._metrics, self._pictures, self._started, self._lines)
        self._metrics, self._pictures, self._started, self._lines = [], [], [], []
        return taken
