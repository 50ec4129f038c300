"""The picture of code sizes, and ticks of axes.

Covers: smalti/ticks.py.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.workflows.codebook.histogram import BAR, LEFT, TOP, WIDTH, sizes_picture


def test_half_of_the_codes_without_a_vector_leave_half_the_picture_white() -> None:
    counts_K = torch.tensor([0, 7] * 40)
    picture = np.asarray(Image.open(io.BytesIO(sizes_picture(counts_K, "train"))))
    bars = (picture == np.array(BAR)).all(-1)
    columns = bars[:, LEFT + 1 :].any(0)
    assert columns[: (WIDTH - LEFT - 16) // 2 - 1].all()
    assert not columns[(WIDTH - LEFT - 16) // 2 + 1 :].any()
    assert bars[TOP:, LEFT + 10].sum() > 200, "the largest code fills the height"


def test_sizes_of_nothing_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="without a vector"):
        sizes_picture(torch.zeros(4, dtype=torch.int64), "train")
