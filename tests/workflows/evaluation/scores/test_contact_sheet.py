"""Contact sheets."""

from __future__ import annotations

import numpy as np

from smalti.workflows.evaluation.scores.contact_sheet import contact_sheet


def test_contact_sheet_places_every_picture() -> None:
    red, blue = np.full((8, 8, 3), (255, 0, 0), np.uint8), np.full((6, 4, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([[red, blue], [blue]])
    assert sheet.shape == (2 * 12 + 4, 2 * 12 + 4, 3)
    assert (sheet == (255, 0, 0)).all(-1).sum() == 64
    assert (sheet == (0, 0, 255)).all(-1).sum() == 48
