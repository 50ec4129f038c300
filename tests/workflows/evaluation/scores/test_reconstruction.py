"""Reconstruction: a planted error gives its PSNR."""

from __future__ import annotations

import math

import numpy as np
import pytest

from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.models import Models
from tests.workflows.evaluation.planted_world import OFFSET, VAL, take


def test_psnr_of_a_planted_error(planted: tuple[HeldOut, Models]) -> None:
    scores = take("reconstruction", planted).scores
    assert scores["reconstruction/psnr"].value == 100.0  # exact copies, bounded
    assert scores["reconstruction/ssim"].value == pytest.approx(1.0)
    expected = 20 * math.log10(2 / OFFSET)
    assert scores["reconstruction/psnr_semantic_only"].value == pytest.approx(expected, abs=1e-3)
    assert scores["reconstruction/psnr_over_semantic_only"].value == pytest.approx(
        100 - expected, abs=1e-3
    )
    assert {score.n for score in scores.values()} == {45}


def test_reconstruction_grid_belongs_to_its_images(planted: tuple[HeldOut, Models]) -> None:
    result = take("reconstruction", planted)
    by_id = {item.image_id: item for item in VAL}
    assert len(result.tables["grid"]) == 16
    for line in result.tables["grid"]:
        assert np.array_equal(result.pictures[line["input"]], by_id[line["image_id"]].pixels)
        assert np.array_equal(result.pictures[line["decoded"]], by_id[line["image_id"]].pixels)
        assert line["psnr"] == 100.0
