"""Ticks of chart axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

FACTORS = (1, 2, 5, 2.5, 4, 3, 1.5, 6, 8)  # of a power of ten between two ticks, the simplest first


def nice_ticks(low: float, high: float, least_step: float = 0.0) -> list[float]:
    """Four to six round numbers from `low` to `high`, at least `least_step` apart.

    With a `least_step` there may be fewer, or more where it is 1 and the range is small.
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    steps = [factor * scale for factor in FACTORS for scale in (power, 10 * power)]
    allowed = [
        step for step in steps if step >= least_step and (not least_step or step % least_step == 0)
    ]
    for step in allowed:
        ticks = _multiples(step, low, high)
        if 4 <= len(ticks) <= 6:
            return ticks
    return _multiples(max(least_step, 10 * power if least_step else power), low, high) or [low]


def _multiples(step: float, low: float, high: float) -> list[float]:
    """Multiples of `step` from `low` to `high`."""
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At most six round ticks of a logarithmic axis; `low` and `high` above 0."""
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) > 6 and factors == (1,):
            return inside[:: math.ceil(len(inside) / 6)]
        if 4 <= len(inside) <= 6:
            return inside
    return nice_ticks(low, high)


def tick_text(value: float, digits: int = 3) -> str:
    """`0.05`, `12`, `1.5k`, `3M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def tick_texts(values: Sequence[float]) -> list[str]:
    """The values as text, with enough digits to distinguish them."""
    for digits in range(3, 8):
        texts = [tick_text(value, digits) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts
