"""What training workers report to the driver, through an actor.

A light module of its own: the actor's process need not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from ray import ObjectRef

    from smalti.errors import SmaltiError

R = TypeVar("R")


class Reports(NamedTuple):
    """Reports of the workers since the last `take`.

    Attributes:
        metrics: (step, numbers) of each logged step.
        pictures: (step, name, HWC uint8).
        started: (steps done, number of workers) of each group that is ready.
        lines: lines for the log.
    """

    metrics: list[tuple[int, dict[str, float]]]
    pictures: list[tuple[int, str, np.ndarray]]
    started: list[tuple[int, int]]
    lines: list[str]


class DriverChannel:
    """Actor between the workers, the driver and what decides on the number of workers.

    It keeps numbers and pictures to log, lines, failures, the error that ends the run, and the
    request for a checkpoint that more workers can start from.
    """

    def __init__(self) -> None:
        self._reports = Reports([], [], [], [])
        self._failed: list[str] = []
        self._fatal: SmaltiError | None = None
        self._requested = False
        self._saved = False

    def metrics(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of a step."""
        self._reports.metrics.append((step, numbers))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture of a step: HWC uint8."""
        self._reports.pictures.append((step, name, picture))

    def started(self, step: int, workers: int) -> None:
        """A group of workers is ready and continues after `step` steps."""
        self._reports.started.append((step, workers))

    def failed(self, line: str) -> None:
        """Why workers restart; "" for errors that the user sees at the end."""
        if line:
            self._failed.append(line)

    def say(self, line: str) -> None:
        """A line for the log."""
        self._reports.lines.append(line)

    def fail(self, error: SmaltiError) -> None:
        """The error that ends the run; the first one counts."""
        self._fatal = self._fatal or error

    def fatal(self) -> SmaltiError | None:
        """The error that ends the run, if there is one."""
        return self._fatal

    def may_restart(self) -> bool:
        """Whether a checkpoint was written since the first call, for more workers to start from.

        While there is none, one is requested.
        """
        saved = self._saved
        self._requested = not saved
        self._saved = False
        return saved

    def checkpoint_requested(self) -> bool:
        """Whether more workers wait for a checkpoint to start from."""
        return self._requested

    def saved(self) -> None:
        """The requested checkpoint is complete."""
        self._requested = False
        self._saved = True

    def take(self) -> Reports:
        """All reports since the last call, except failures."""
        taken = self._reports
        self._reports = Reports([], [], [], [])
        return taken

    def take_failures(self) -> list[str]:
        """Why workers restarted, since the last call."""
        taken = self._failed
        self._failed = []
        return taken


class RemoteMethod(Protocol[R]):
    """A method of an actor, as its handle has it."""

    def remote(self, *args: object) -> ObjectRef[R]: ...


class ChannelHandle(Protocol):
    """Handle of a DriverChannel actor."""

    @property
    def metrics(self) -> RemoteMethod[None]: ...

    @property
    def picture(self) -> RemoteMethod[None]: ...

    @property
    def started(self) -> RemoteMethod[None]: ...

    @property
    def failed(self) -> RemoteMethod[None]: ...

    @property
    def say(self) -> RemoteMethod[None]: ...

    @property
    def fail(self) -> RemoteMethod[None]: ...

    @property
    def fatal(self) -> RemoteMethod[SmaltiError | None]: ...

    @property
    def may_restart(self) -> RemoteMethod[bool]: ...

    @property
    def checkpoint_requested(self) -> RemoteMethod[bool]: ...

    @property
    def saved(self) -> RemoteMethod[None]: ...

    @property
    def take(self) -> RemoteMethod[Reports]: ...

    @property
    def take_failures(self) -> RemoteMethod[list[str]]: ...
