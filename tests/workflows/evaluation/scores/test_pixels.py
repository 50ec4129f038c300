"""Pixels between uint8 images and a model."""

from __future__ import annotations

import numpy as np
import torch

from smalti.workflows.evaluation.scores.pixels import thumbnail, to_model, to_uint8


def test_pixels_survive_the_way_there_and_back() -> None:
    bhwc = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = to_model(bhwc)
    assert pixels.shape == (1, 3, 16, 16)
    assert float(pixels.min()) == -1
    assert float(pixels.max()) == 1
    assert np.array_equal(to_uint8(pixels), bhwc)
    assert to_uint8(torch.full((1, 3, 2, 2), 7.0)).max() == 255


def test_thumbnail_never_enlarges() -> None:
    assert thumbnail(np.zeros((64, 32, 3), np.uint8)).shape == (64, 32, 3)
    assert thumbnail(np.zeros((512, 256, 3), np.uint8), 128).shape == (128, 64, 3)
