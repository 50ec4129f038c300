"""Two sides of a benchmark in turns, by CPU-seconds; and the memory that one of them needs at its
peak.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU-seconds of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def in_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], turns: int, *, warm: bool = False
) -> tuple[float, float]:
    """Medians of the CPU-seconds of both sides, after a call of each that is not counted, unless
    they are `warm`.
    """
    if not warm:
        ours()
        theirs()
    times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(turns)]
    first, second = (statistics.median(side) for side in zip(*times, strict=True))
    return first, second


def peak_bytes(work: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises above its start while `work` runs, in a forked process
    (Linux).

    Call it before other work, so that no freed memory lies about to be used again.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_peak, args=(work, sender))
    process.start()
    found = receiver.recv()
    process.join()
    return found


def rise_bytes(work: Callable[[], Any]) -> int:
    """As `peak_bytes`, in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    kept = work()
    rise = _status("VmHWM") - before
    del kept
    return rise


def _peak(work: Callable[[], Any], sender: Any) -> None:
    sender.send(rise_bytes(work))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
