"""Ticks of chart axes."""

from __future__ import annotations

import math


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between `low` and `high` (both above 0); at most six."""
    powers = list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))
    return [10.0**power for power in powers[:: max(1, math.ceil(len(powers) / 6))]]


def tick_text(value: float) -> str:
    """`0.05`, `12`, `1.5k`, `3M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
