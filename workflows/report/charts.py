"""Charts as inline SVG.

Colours are CSS classes, so that they follow the page's light or dark theme.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from smalti.ticks import log_ticks, nice_ticks, tick_text, tick_texts

Point = tuple[float, float]
WIDTH, WIDE, HEIGHT = 320, 460, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MOST_POINTS = 400
FEW_VALUES = 8
LEAST_SHARE = 1 / 3  # of the axis, for all but the first points of a curve


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the mean of each run of neighbours (both coordinates)."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


@dataclass(frozen=True)
class YRange:
    """Range of the vertical axis, and a note if it leaves values out."""

    low: float
    high: float
    log: bool = False
    note: str = ""


def y_range(values: Sequence[float]) -> YRange:
    """The range of a curve whose first values may lie far from all others.

    If the first 5 % of the values (at least one) take more than two thirds of the range, the axis
    is logarithmic, or where that does not help, it covers the other values alone. The note says
    which.
    """
    low, high = min(values), max(values)
    if len(values) < FEW_VALUES and high > low:
        return YRange(low, high)
    if high == low:
        margin = abs(low) * 0.1 + 1e-9
        return YRange(low - margin, high + margin)
    first = max(1, len(values) // 20)
    later = values[first:]
    if len(later) < 2 or max(later) == min(later) or _share(later, low, high) >= LEAST_SHARE:
        return YRange(low, high)
    if (
        low > 0
        and _share([math.log(value) for value in later], math.log(low), math.log(high))
        >= LEAST_SHARE
    ):
        return YRange(low, high, log=True, note="log scale")
    margin = 0.05 * (max(later) - min(later))
    shown = YRange(min(later) - margin, max(later) + margin)
    outside = [value for value in values if not shown.low <= value <= shown.high]
    points = "point" if len(outside) == 1 else "points"
    farthest = max(outside, key=lambda value: abs(value - shown.low))
    return dataclasses.replace(
        shown, note=f"{len(outside)} {points} outside, to {tick_text(farthest)}"
    )


def _share(values: Sequence[float], low: float, high: float) -> float:
    """The part of a range that the values take."""
    return (max(values) - min(values)) / (high - low)


def line_chart(points: Sequence[Point], title: str, x_name: str = "step") -> str:
    """A curve with axes.

    Points that are not finite are left out; the title says how many.
    """
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return ""
    lost = len(points) - len(finite)
    shown = thin(finite)
    axis = y_range([y for _, y in shown])
    shown = [(x, min(max(y, axis.low), axis.high)) for x, y in shown]
    xs = (shown[0][0], shown[-1][0])
    frame = _Frame((min(xs), max(xs)), (axis.low, axis.high), log_y=axis.log)
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in shown)
    label = (
        f"{title}: {tick_text(finite[0][1])} at {x_name} {finite[0][0]:g}, "
        f"{tick_text(finite[-1][1])} at {finite[-1][0]:g}"
    )
    if axis.note:
        label += f"; {axis.note}"
    if lost:
        label += f"; {lost} points were not finite"
    body = f'<polyline class="curve" points="{path}"/>'
    body += (
        f'<circle class="dot" cx="{frame.x(shown[-1][0]):.1f}" cy="{frame.y(shown[-1][1]):.1f}" '
        'r="2.6"/>'
    )
    y_ticks = log_ticks(axis.low, axis.high) if axis.log else nice_ticks(axis.low, axis.high)
    return _svg(label, frame.axes(nice_ticks(*frame.xs, least_step=1.0), y_ticks, axis.note) + body)


def rank_chart(points: Sequence[tuple[int, int]], title: str) -> str:
    """Counts over rank, both logarithmic, as a filled curve.

    Codes that never occur are not drawn.
    """
    shown = [(float(rank), float(count)) for rank, count in points if count > 0]
    if not shown:
        return ""
    most_rank = float(max(max(rank for rank, _ in points), 2))
    top = max(shown[0][1], 2.0)
    frame = _Frame((1.0, most_rank), (0.8, top * 1.15), log_x=True, log_y=True, width=WIDE)
    line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in shown)
    base = frame.y(0.8)
    area = f"{frame.x(shown[0][0]):.1f},{base:.1f} {line} {frame.x(shown[-1][0]):.1f},{base:.1f}"
    body = f'<polygon class="area" points="{area}"/><polyline class="curve" points="{line}"/>'
    return _svg(title, frame.axes(log_ticks(1, most_rank), log_ticks(1, top)) + body, WIDE)


class _Frame:
    """From data to pixels, and the axes around it."""

    def __init__(
        self, xs: Point, ys: Point, *, log_x: bool = False, log_y: bool = False, width: int = WIDTH
    ) -> None:
        self.xs = xs
        self.ys = ys
        self.log_x = log_x
        self.log_y = log_y
        self.width = width

    def x(self, value: float) -> float:
        return LEFT + _position(value, self.xs, self.log_x) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - _position(value, self.ys, self.log_y) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float], note: str = "") -> str:
        """Horizontal grid lines, numbers at both axes, and a note at the top right."""
        parts = []
        for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
            y = self.y(tick)
            parts.append(
                f'<line class="rule" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/>'
            )
            parts.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" '
                f'text-anchor="end">{text}</text>'
            )
        for tick, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
            x = min(self.x(tick), self.width - RIGHT - 6)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 7}" '
                f'text-anchor="middle">{text}</text>'
            )
        if note:
            x = self.width - RIGHT
            parts.append(
                f'<text class="tick" x="{x}" y="{TOP + 6}" text-anchor="end">{escape(note)}</text>'
            )
        return "".join(parts)


def _position(value: float, span: Point, log: bool) -> float:
    """Where a value lies in a span: 0 at its low end, 1 at its high end."""
    low, high = span
    if log:
        value = math.log(value)
        low = math.log(low)
        high = math.log(high)
    return 0.5 if high <= low else (value - low) / (high - low)


def _svg(title: str, body: str, width: int = WIDTH) -> str:
    text = escape(title)
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" '
        f'aria-label="{text}"><title>{text}</title>{body}</svg>'
    )
