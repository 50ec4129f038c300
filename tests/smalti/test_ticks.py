"""Ticks of an axis: few, round and inside its range."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.ticks import log_ticks, nice_ticks, tick_text, tick_texts


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    for low, high in (
        (0, 1),
        (-3.2, 8.9),
        (1e-6, 2e-6),
        (5, 5e6),
        (0, 2.04),
        (2.3, 2.9),
        (0.999, 1.001),
    ):
        ticks = nice_ticks(low, high)
        assert 4 <= len(ticks) <= 6
        assert all(low - 1e-9 * abs(high) <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert nice_ticks(1, 3, least_step=1) == [1, 2, 3]
    assert nice_ticks(0, 900, least_step=1) == [0, 200, 400, 600, 800]
    assert log_ticks(1, 1e4) == [1, 10, 100, 1000, 10000]
    assert log_ticks(1, 22) == [1, 2, 5, 10, 20]
    assert log_ticks(1, 256) == pytest.approx([1, 3, 10, 30, 100])
    assert tick_texts([1000.1, 1000.2, 1000.3]) == ["1.0001k", "1.0002k", "1.0003k"]
    assert [tick_text(x) for x in (0.05, 12, 1500, 3e6)] == ["0.05", "12", "1.5k", "3M"]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_every_range_has_four_to_six_ticks(low: float, width: float) -> None:
    assert 4 <= len(nice_ticks(low, low + width)) <= 6


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e12))
def test_logarithmic_ticks_are_few_and_inside(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 2 <= len(ticks) <= 6
    assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in ticks)
