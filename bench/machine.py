"""What benchmarks share: sides timed in turns, the machine's name, and the line of JSON that ends
each.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def machine() -> str:
    """`Intel Xeon …, 2 cores`."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU-seconds that this process takes for the work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median CPU-seconds of each side; a turn runs all of them one after the other."""
    seconds = [{name: cpu_seconds(work) for name, work in sides.items()} for _ in range(turns)]
    return {name: statistics.median(turn[name] for turn in seconds) for name in sides}


def report(goal: int, *, ratio: float, quality: float, met: bool, **more: Any) -> None:
    """Print the result as `python -m bench` reads it: one line of JSON, the last."""
    first = {"goal": goal, "ratio": round(ratio, 3)}
    print(
        json.dumps(first | more | {"quality": round(quality, 4), "met": met, "machine": machine()})
    )
