"""Buffer for entries of a tracking store that may not answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from smalti.progress import log

AGAIN_AFTER_S = 30.0
KEPT_CALLS, KEPT_NUMBERS = 500, 500_000
PASSING = {
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
}


Number = TypeVar("Number")


class Outbox(Generic[Number]):
    """Thread-safe queue of calls and numbers for the store `where`; never raises.

    `send_numbers` is called with lists of at most `batch` numbers. The queue is bounded: the oldest
    entries are dropped first. A call that the store refuses permanently (a deleted run) is logged
    and dropped.
    """

    def __init__(
        self, where: str, send_numbers: Callable[[list[Number]], None], batch: int
    ) -> None:
        self.where = where
        self.send_numbers = send_numbers
        self.batch = batch
        self.dropped = 0
        self._calls: deque[Callable[[], None]] = deque()
        self._numbers: deque[Number] = deque()
        self._away_since: float | None = None
        self._tried = time.monotonic()
        self._lock = threading.RLock()

    def call(self, action: Callable[[], None]) -> None:
        """Call `action` now, or later when the store answers again."""
        with self._lock:
            self._calls.append(action)
            self._bound(self._calls, KEPT_CALLS)
            self.flush()

    def add(self, numbers: list[Number], flush_after_s: float) -> None:
        """Queue numbers; send a full batch, or all after `flush_after_s`."""
        with self._lock:
            self._numbers.extend(numbers)
            self._bound(self._numbers, KEPT_NUMBERS)
            if len(self._numbers) >= self.batch or time.monotonic() - self._tried > flush_after_s:
                self.flush()

    def flush(self, *, now: bool = False) -> bool:
        """Send the queue; True when it is empty.

        A store that does not answer is retried every 30 seconds, or at once with `now`.
        """
        with self._lock:
            waiting = (
                self._away_since is not None and time.monotonic() - self._tried < AGAIN_AFTER_S
            )
            if waiting and not now:
                return False
            try:
                while self._numbers:
                    part = [
                        self._numbers[place] for place in range(min(self.batch, len(self._numbers)))
                    ]
                    self._attempt(partial(self.send_numbers, part))
                    for _ in part:
                        self._numbers.popleft()
                for _ in range(len(self._calls)):
                    self._attempt(self._calls[0])
                    self._calls.popleft()
            except Exception as error:
                self._calls.rotate(-1)  # an entry that always fails does not block the others
                self._away(error)
                return False
            finally:
                self._tried = time.monotonic()
            self._back()
            return True

    def left(self) -> str:
        """Description of what is queued or was dropped; empty for nothing."""
        parts = [f"{len(self._numbers):,} numbers"] * bool(self._numbers)
        parts += [f"{len(self._calls):,} other entries"] * bool(self._calls)
        parts += [f"{self.dropped:,} dropped before"] * bool(self.dropped)
        return ", ".join(parts)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if getattr(error, "error_code", "INTERNAL_ERROR") in PASSING:
                raise
            self.dropped += 1
            log(f"MLflow at {self.where} refused an entry, which is dropped: {_first_line(error)}")

    def _bound(self, kept: deque[Number] | deque[Callable[[], None]], most: int) -> None:
        while len(kept) > most:
            kept.popleft()
            self.dropped += 1

    def _away(self, error: Exception) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            log(
                f"MLflow at {self.where} does not answer; entries are kept until it does: "
                f"{_first_line(error)}"
            )

    def _back(self) -> None:
        if self._away_since is not None:
            away_s = time.monotonic() - self._away_since
            self._away_since = None
            lost = f"; {self.dropped:,} entries did not fit and are lost" if self.dropped else ""
            log(
                f"MLflow at {self.where} answers again after {away_s:.0f} s; the kept entries are "
                f"sent{lost}"
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]}…"
