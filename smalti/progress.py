"""Progress for terminals and log files.

On a terminal one line is redrawn; elsewhere plain lines are written every few seconds at most, the
first and the last always. All goes to stderr, so that stdout has results only.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import IO

REDRAW_S = 0.1
PLAIN_LINE_S = 5.0


def log(message: str) -> None:
    """Write one line to stderr, in place of a progress line being drawn."""
    stream = sys.stderr
    if _is_terminal(stream):
        stream.write("\r\x1b[K")
    stream.write(message + "\n")
    stream.flush()


def format_seconds(seconds: float) -> str:
    """`7 s`, `3 min 05 s`, `2 h 04 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(value: float) -> str:
    """Three significant figures below 100, whole numbers with thousands separators above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Progress:
    """A progress line: count, rate since the start, and time left.

    Args:
        total: units to expect; None: unknown.
        unit: name of what is counted, in the plural.
        label: start of the line.
        done: units of an earlier process (a resumed stage): counted, but not in the rate.
            `skip` counts those that are found later.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        label: str,
        *,
        done: int = 0,
        stream: IO[str] | None = None,
    ) -> None:
        self.total = total
        self.unit = unit
        self.label = label
        self.count = done
        self._before = done
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = _is_terminal(self._stream)
        self._lock = threading.Lock()
        self._info: dict[str, object] = {}
        self._started = time.monotonic()
        self._shown = self._started

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        self._show(self._started)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._show(time.monotonic(), last=True, failed=kind is not None)

    def skip(self, n: int) -> None:
        """Count `n` units of an earlier process."""
        with self._lock:
            self._before += n
        self.update(n)

    def update(self, n: int = 1, **info: object) -> None:
        """Count `n` more units; `info`, such as a loss, is shown at the end of the line."""
        with self._lock:
            self.count += n
            self._info.update(info)
            now = time.monotonic()
            if now - self._shown >= (REDRAW_S if self._terminal else PLAIN_LINE_S):
                self._show(now)

    def line(self, now: float) -> str:
        """The line as shown at the monotonic time `now`."""
        elapsed_s = now - self._started
        new = self.count - self._before
        rate = new / elapsed_s if elapsed_s > 0 else 0.0
        share = f"/{self.total:,} ({100 * self.count / self.total:.0f} %)" if self.total else ""
        parts = [f"{self.label}: {self.count:,}{share} {self.unit}"]
        if new and rate > 0:
            parts.append(f"{format_count(rate)} {self.unit}/s")
            if self.total and self.count < self.total:
                parts.append(f"{format_seconds((self.total - self.count) / rate)} left")
        parts += [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self._info.items()
        ]
        return ", ".join(parts)

    def _show(self, now: float, *, last: bool = False, failed: bool = False) -> None:
        self._shown = now
        text = self.line(now)
        if last:
            text += f", {'stopped after' if failed else 'in'} {format_seconds(now - self._started)}"
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + text[:width] + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def _is_terminal(stream: IO[str]) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())
