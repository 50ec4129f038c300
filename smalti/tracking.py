"""What a stage tells of its progress, whoever listens. `workflows` has the MLflow one; the base knows no service."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Status = Literal["FINISHED", "FAILED"]


@runtime_checkable
class Tracker(Protocol):
    """One run: of a recipe, or of a stage of it. Must pickle, so that rank 0 of a training can log to it."""

    run_id: str | None

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings, by dotted key."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record measures; `step` orders those of a training."""

    def image(self, key: str, pixels: np.ndarray, step: int | None = None) -> None:
        """Record a picture: uint8 (H, W, 3)."""

    def system_metrics(self) -> AbstractContextManager[None]:
        """Within, record how busy this machine is."""
        ...

    def artifact_text(self, name: str, text: str) -> None:
        """Record a small text file under `name`."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Record names and fingerprints."""

    def child(self, name: str) -> Tracker:
        """A run under this one: a stage of the recipe. The same name twice goes on in the same run."""
        ...

    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run."""


class NullTracker:
    """Listens to nothing."""

    run_id: str | None = None

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def image(self, key: str, pixels: np.ndarray, step: int | None = None) -> None:
        pass

    def system_metrics(self) -> AbstractContextManager[None]:
        return nullcontext()

    def artifact_text(self, name: str, text: str) -> None:
        pass

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def child(self, name: str) -> NullTracker:
        return NullTracker()

    def finish(self, status: Status = "FINISHED") -> None:
        pass
