"""Patches of images, and the gallery of patches that share a code."""

from __future__ import annotations

import numpy as np

from smalti.workflows.evaluation.scores.patches import cut_patches, gallery, in_context


def test_patches_are_cut_in_token_order() -> None:
    bhwc = np.zeros((2, 6, 9, 3), dtype=np.uint8)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                bhwc[image, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] = 10 * (
                    image * 6 + row * 3 + column
                )
    patches = cut_patches(bhwc, (2, 3))
    assert patches.shape == (12, 3, 3, 3)
    assert (patches == (10 * np.arange(12)).reshape(12, 1, 1, 1)).all()


def test_patches_leave_out_what_the_grid_does_not_cover() -> None:
    assert cut_patches(np.zeros((1, 13, 13, 3), dtype=np.uint8), (3, 3)).shape == (9, 4, 4, 3)


def test_gallery_shows_the_planted_code() -> None:
    rng = np.random.default_rng(0)
    bhwc = np.full((10, 16, 16, 3), 90, dtype=np.uint8)
    ids = rng.integers(0, 2, size=(10, 4))
    ids[:, 3] = 7  # the bottom right patch of every image, and it alone has detail
    bhwc[:, 8:, 8:] = rng.integers(0, 255, size=(10, 8, 8, 3))
    lines, pictures = gallery(bhwc, ids, (2, 2), seed=0)
    assert lines[0]["code"] == 7
    assert lines[0]["patches"] == 10
    assert lines[0]["images"] == 10
    assert len(lines[0]["pictures"]) == 8
    assert {line["code"] for line in lines} == {0, 1, 7}
    assert all(name in pictures for line in lines for name in line["pictures"])


def test_gallery_wants_three_images_a_code() -> None:
    lines, pictures = gallery(
        np.zeros((2, 8, 8, 3), dtype=np.uint8), np.zeros((2, 4), dtype=int), (2, 2), seed=0
    )
    assert lines == []
    assert pictures == {}


def test_patch_stands_in_the_middle_of_its_picture() -> None:
    hwc = np.zeros((16, 16, 3), dtype=np.uint8)
    hwc[8:12, 4:8] = (255, 0, 0)  # token 9 of a 4 by 4 grid
    picture = in_context(hwc, (4, 4), 9)
    assert picture.shape[0] == picture.shape[1] == 96
    assert tuple(picture[48, 48]) == (255, 0, 0)
    assert picture[2, 2].max() < 128  # the dimmed surrounding
