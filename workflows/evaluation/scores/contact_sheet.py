"""Many small pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GAP = 4
PAPER = 255


def contact_sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """uint8 (H, W, 3): the pictures in rows, top left in cells of one size, on white.

    Rows may differ in length.
    """
    if not any(len(row) for row in rows):
        raise ValueError("a contact sheet needs at least one picture")
    tall = max(hwc.shape[0] for row in rows for hwc in row) + GAP
    wide = max(hwc.shape[1] for row in rows for hwc in row) + GAP
    sheet = np.full(
        (tall * len(rows) + GAP, wide * max(map(len, rows)) + GAP, 3), PAPER, dtype=np.uint8
    )
    for y, row in enumerate(rows):
        for x, hwc in enumerate(row):
            top = GAP + y * tall
            left = GAP + x * wide
            sheet[top : top + hwc.shape[0], left : left + hwc.shape[1]] = hwc
    return sheet
