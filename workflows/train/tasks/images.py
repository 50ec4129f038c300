"""What the image tasks share: batches of pixels, memory of encoder features, pictures for the log.

Axis letters: B images, N patches, C feature width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from smalti.workflows.train.task import Row

FEATURE_BYTES = 1 << 30
BORDER = 2


def stack_pixels(rows: Sequence[Row]) -> Tensor:
    """Pixels of rows: uint8 (B, 3, H, W)."""
    return (
        torch.from_numpy(np.stack([row.values["pixels"] for row in rows]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels / 127.5 - 1


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1], clamped: uint8 (B, H, W, 3)."""
    return (
        ((images.float().clamp(-1, 1) + 1) * 127.5)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )


def picture_grid(columns: Sequence[Tensor]) -> np.ndarray:
    """Columns of images (B, 3, H, W) in [-1, 1] side by side, a row an image: uint8 (H', W', 3),
    white between.
    """
    cells = [to_bytes(column) for column in columns]
    count, height, width, _ = cells[0].shape
    grid = np.full(
        (count * (height + BORDER) - BORDER, len(cells) * (width + BORDER) - BORDER, 3),
        255,
        np.uint8,
    )
    for c, column in enumerate(cells):
        for r, image in enumerate(column):
            top, left = r * (height + BORDER), c * (width + BORDER)
            grid[top : top + height, left : left + width] = image
    return grid


class RowMemory:
    """Keeps one tensor a row (frozen features, semantic codes) while all rows fit into
    `limit_bytes`; else nothing.

    What it holds was computed without augmentation, so that it is the same at every visit of the
    row.
    """

    def __init__(self, num_rows: int, limit_bytes: int = FEATURE_BYTES) -> None:
        self.num_rows, self.limit_bytes = num_rows, limit_bytes
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._fits: bool | None = None

    def get(
        self, places: Sequence[tuple[str, int]], compute: Callable[[list[int]], Tensor]
    ) -> Tensor:
        """Tensors of the rows at `places` (B, …); `compute` makes those of the batch positions that
        are not kept.
        """
        missing = [b for b, place in enumerate(places) if place not in self._kept]
        if not missing:
            return torch.stack([self._kept[place] for place in places])
        made = compute(missing)
        if self._fits is None:
            self._fits = self.num_rows * made[0].numel() * made.element_size() <= self.limit_bytes
        if not self._fits:
            return made
        for b, row in zip(missing, made, strict=True):
            self._kept[places[b]] = row
        return torch.stack([self._kept[place] for place in places])


def chosen(pixels: Tensor, positions: list[int]) -> Tensor:
    """Images at these positions of a batch, in order; no copy if these are all."""
    return pixels if len(positions) == len(pixels) else pixels[positions]


def places_of(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Where rows lie: keys for `RowMemory`."""
    return [(row.shard, row.row) for row in rows]
