"""Pixels, picture grids, and rows computed once."""

from __future__ import annotations

import numpy as np
import torch

from smalti.workflows.train.tasks.images import RowMemory, picture_grid, to_bytes, to_unit


def test_row_memory_computes_once_and_keeps_nothing_that_does_not_fit() -> None:
    asked: list[list[int]] = []

    def compute(missing: list[int]) -> torch.Tensor:
        asked.append(missing)
        return torch.tensor([[float(i)] for i in missing])

    memory = RowMemory(10)
    places = [("a", 0), ("a", 1)]
    assert memory.get(places, compute).tolist() == [[0.0], [1.0]]
    assert memory.get([("a", 1), ("b", 0), ("a", 0)], compute).tolist() == [[1.0], [1.0], [0.0]]
    assert asked == [[0, 1], [1]]
    small = RowMemory(10, limit_bytes=39)
    for _ in range(2):
        assert small.get(places, compute).tolist() == [[0.0], [1.0]]
    assert asked[2:] == [[0, 1], [0, 1]] and not small._kept


def test_pixels_pass_both_ways_and_grids_stand_side_by_side() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert np.array_equal(to_bytes(to_unit(pixels)), pixels.permute(0, 2, 3, 1).numpy())
    grid = picture_grid([to_unit(pixels), to_unit(pixels)])
    assert (
        grid.shape == (34, 34, 3)
        and (grid[16:18] == 255).all()
        and np.array_equal(grid[:16, :16], grid[18:, 18:])
    )
