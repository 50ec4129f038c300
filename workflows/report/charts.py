"""Charts as inline SVG. Colours are CSS classes, so that they follow the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from smalti.ticks import log_ticks, tick_text

Point = tuple[float, float]
WIDTH, WIDE, HEIGHT = 320, 460, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MOST_POINTS = 400


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) from `low` to `high`, about `about` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the mean of each run of neighbours (both coordinates)."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def line_chart(points: Sequence[Point], title: str, x_name: str = "step") -> str:
    """A curve with axes. Points that are not finite are left out, and the title says how many."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return ""
    lost = len(points) - len(finite)
    shown = thin(finite)
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    if high == low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    frame = _Frame((min(x for x, _ in shown), max(x for x, _ in shown)), (low, high))
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in shown)
    last_x, last_y = shown[-1]
    label = f"{title}: {tick_text(finite[0][1])} at {x_name} {finite[0][0]:g}, {tick_text(finite[-1][1])} at {finite[-1][0]:g}"
    if lost:
        label += f"; {lost} points were not finite"
    body = f'<polyline class="curve" points="{path}"/>'
    body += f'<circle class="dot" cx="{frame.x(last_x):.1f}" cy="{frame.y(last_y):.1f}" r="2.6"/>'
    return _svg(label, frame.axes(nice_ticks(*frame.xs), nice_ticks(low, high)) + body)


def rank_chart(points: Sequence[tuple[int, int]], title: str) -> str:
    """Counts over rank, both logarithmic, as a filled curve; codes that never occur are not drawn."""
    shown = [(float(rank), float(count)) for rank, count in points if count > 0]
    if not shown:
        return ""
    most_rank = float(max(max(rank for rank, _ in points), 2))
    top = max(shown[0][1], 2.0)
    frame = _Frame((1.0, most_rank), (0.8, top * 1.15), log=True, width=WIDE)
    line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in shown)
    base = frame.y(0.8)
    area = f"{frame.x(shown[0][0]):.1f},{base:.1f} {line} {frame.x(shown[-1][0]):.1f},{base:.1f}"
    body = f'<polygon class="area" points="{area}"/><polyline class="curve" points="{line}"/>'
    return _svg(title, frame.axes(log_ticks(1, most_rank), log_ticks(1, top)) + body, WIDE)


class _Frame:
    """From data to pixels, and the axes around it."""

    def __init__(self, xs: Point, ys: Point, log: bool = False, width: int = WIDTH) -> None:
        self.xs, self.ys, self.log, self.width = xs, ys, log, width

    def _place(self, value: float, span: Point) -> float:
        low, high = span
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 0.5 if high <= low else (value - low) / (high - low)

    def x(self, value: float) -> float:
        return LEFT + self._place(value, self.xs) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self._place(value, self.ys) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
        """Horizontal grid lines with their numbers, and numbers under the x axis."""
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>'
            )
        for tick in x_ticks:
            x = min(self.x(tick), self.width - RIGHT - 6)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{tick_text(tick)}</text>'
            )
        return "".join(parts)


def _svg(title: str, body: str, width: int = WIDTH) -> str:
    text = escape(title)
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{text}"><title>{text}</title>{body}</svg>'
