"""Which sequences share a row of a batch: best fit into rows of about one length, made as narrow as
they can be.

A row's sequences do not see each other (`smalti.mllm.model.visible_mask`) and each begins at
position 0, so how they are packed changes the cost of a batch and nothing else: which samples a
step holds stays the order's affair.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

WIDEST = 1.5
"""How many times `room` a row may be wide: positions begin anew with each sequence, so a wide row
is no longer context.
"""


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of about `room` places, each sequence in one of them, that together have as few places
    as can be.

    A batch is as wide as its fullest row. So for each number of rows the narrowest width is sought
    at which best fit gets by with it, and of those up to `WIDEST` times `room` (or the longest
    sequence) the least area wins, then the narrowest: what would be a half-empty last row is spread
    over all. Deterministic; no lengths, no rows.
    """
    if not lengths:
        return []
    total, widest = sum(lengths), max(int(WIDEST * room), *lengths)
    within = best_fit(lengths, max(room, *lengths))
    found = [(within, width_of(within, lengths))]
    found += [
        narrowest(lengths, num)
        for num in range(max(1, -(-total // widest)), round(total / room) + 2)
    ]
    areas = [(len(rows) * width, width, rows) for rows, width in found if width <= widest]
    return min(areas, key=lambda one: one[:2])[2]


def narrowest(lengths: Sequence[int], num: int) -> tuple[list[list[int]], int]:
    """At most `num` rows by best fit, and the least width for which it needs no more (found by
    bisection).
    """
    low, high = max(max(lengths), -(-sum(lengths) // num)), sum(lengths)
    rows = [list(range(len(lengths)))]
    while low < high:
        middle = (low + high) // 2
        narrower = best_fit(lengths, middle)
        if len(narrower) <= num:
            rows, high = narrower, middle
        else:
            low = middle + 1
    return rows, width_of(rows, lengths)


def width_of(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Places of the fullest row."""
    return max(sum(lengths[index] for index in row) for row in rows)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which sequences share a row of `room` places: the longest first, each into the fullest row
    that it still fits.

    Every index stands in exactly one row; deterministic. A sequence that is longer than `room` gets
    a row of its own.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (places left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(open_rows, (lengths[index], -1))
        if at < len(open_rows):
            left, row = open_rows.pop(at)
            rows[row].append(index)
        else:
            left, row = room, len(rows)
            rows.append([index])
        insort(open_rows, (left - lengths[index], row))
    return rows
