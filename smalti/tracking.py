"""Interface of experiment tracking; `smalti.workflows.tracking` implements it for MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, runtime_checkable

import numpy as np

Status = Literal["FINISHED", "FAILED"]


@runtime_checkable
class Tracker(Protocol):
    """One tracked run, of a recipe or of one of its stages.

    It must pickle, so that rank 0 of a training can log to it.
    """

    run_id: str | None

    def params(self, values: Mapping[str, object]) -> None:
        """Log settings by dotted key."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, of a training step if `step` is given."""

    def image(self, key: str, pixels: np.ndarray, step: int | None = None) -> None:
        """Log an image: uint8 (H, W, 3)."""

    def system_metrics(self) -> AbstractContextManager[None]:
        """Log the load of this node while in the context."""
        ...

    def tags(self, values: Mapping[str, str]) -> None:
        """Log names and fingerprints."""

    def child(self, name: str) -> Tracker:
        """A run below this one, for a stage; the same name resumes the same run."""
        ...

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run."""


class NullTracker:
    """A tracker that logs nothing."""

    run_id: str | None = None

    def params(self, values: Mapping[str, object]) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def image(self, key: str, pixels: np.ndarray, step: int | None = None) -> None:
        pass

    def system_metrics(self) -> AbstractContextManager[None]:
        return nullcontext()

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def child(self, name: str) -> NullTracker:
        return NullTracker()

    def finish(self, status: Status = "FINISHED") -> None:
        pass
