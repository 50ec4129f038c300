"""What tasks over images share: batches of pixels, memory of features, pictures for the log.

Axis letters: B images, N patches, C feature width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from smalti.schema import Train
from smalti.tokenizers.encoders import VisionEncoder, open_encoder
from smalti.workflows.train.data import ImageRows
from smalti.workflows.train.task import Batch, Context, Row, Source, Task

FEATURE_BYTES = 1 << 30
BORDER = 2


def stack_pixels(rows: Sequence[Row]) -> Tensor:
    """Pixels of rows: uint8 (B, 3, H, W)."""
    pixels_BHWC = torch.from_numpy(np.stack([row.values["pixels"] for row in rows]))
    return pixels_BHWC.permute(0, 3, 1, 2).contiguous()


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels / 127.5 - 1


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1], clamped: uint8 (B, H, W, 3)."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def picture_grid(columns: Sequence[Tensor]) -> np.ndarray:
    """Images side by side on white: uint8 (H', W', 3).

    Args:
        columns: columns of the grid, each (B, 3, H, W) in [-1, 1].
    """
    cells = [to_bytes(column) for column in columns]
    count, height, width, _ = cells[0].shape
    full_height = count * (height + BORDER) - BORDER
    full_width = len(cells) * (width + BORDER) - BORDER
    grid = np.full((full_height, full_width, 3), 255, np.uint8)
    for c, column in enumerate(cells):
        for r, image in enumerate(column):
            top = r * (height + BORDER)
            left = c * (width + BORDER)
            grid[top : top + height, left : left + width] = image
    return grid


class RowMemory:
    """Keeps one tensor per row (frozen features, semantic codes), or nothing.

    It keeps them if those of all rows fit into `limit_bytes`. They are computed without
    augmentation, so they are the same in every epoch.
    """

    def __init__(self, num_rows: int, limit_bytes: int = FEATURE_BYTES) -> None:
        self.num_rows = num_rows
        self.limit_bytes = limit_bytes
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._fits: bool | None = None

    def get(
        self, places: Sequence[tuple[str, int]], compute: Callable[[list[int]], Tensor]
    ) -> Tensor:
        """Tensors (B, …) of the rows at `places`.

        Args:
            places: (shard's key, row) of each position of the batch.
            compute: computes the tensors of the batch positions that are not kept.
        """
        missing = [b for b, place in enumerate(places) if place not in self._kept]
        if not missing:
            return torch.stack([self._kept[place] for place in places])
        computed = compute(missing)
        if self._fits is None:
            row_bytes = computed[0].numel() * computed.element_size()
            self._fits = self.num_rows * row_bytes <= self.limit_bytes
        if not self._fits:
            return computed
        for b, row in zip(missing, computed, strict=True):
            self._kept[places[b]] = row
        return torch.stack([self._kept[place] for place in places])


def chosen(pixels: Tensor, positions: list[int]) -> Tensor:
    """Images at these positions of a batch, in order; no copy if these are all."""
    return pixels if len(positions) == len(pixels) else pixels[positions]


def places_of(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Shards and row numbers of rows: keys for `RowMemory`."""
    return [(row.shard, row.row) for row in rows]


def encodes_in_bf16(precision: str, train: Train, gpu: bool) -> bool:
    """Whether the frozen encoder computes in bf16.

    Args:
        precision: `tokenizer.encoder_precision`; "auto" follows the trained model on a GPU.
        train: has the precision of the trained model.
        gpu: whether the device is a GPU.
    """
    return precision == "bf16" or (precision == "auto" and gpu and train.precision == "bf16")


class ImageSettings(TypedDict):
    """Arguments of an `ImageTask`."""

    corpus: str
    keys: list[str]
    sizes: list[int]
    image_size: int
    max_pixels: int
    encoder: str | None
    layer: int
    encoder_precision: NotRequired[str]


class ImageTask(Task):
    """Base of tasks over corpus images with a frozen encoder.

    Args:
        corpus: folder of the corpus.
        keys: its training shards.
        sizes: their numbers of rows.
        image_size: side of the images in pixels.
        max_pixels: largest image that is decoded.
        encoder: folder or hub name of the encoder; None without one.
        layer: its layer whose features are used.
        encoder_precision: see `encodes_in_bf16`.
    """

    def __init__(
        self,
        corpus: str,
        keys: list[str],
        sizes: list[int],
        image_size: int,
        max_pixels: int,
        encoder: str | None,
        layer: int,
        encoder_precision: str = "auto",
    ) -> None:
        self.corpus = corpus
        self.keys = keys
        self.sizes = sizes
        self.image_size = image_size
        self.max_pixels = max_pixels
        self.encoder_path = encoder
        self.layer = layer
        self.encoder_precision = encoder_precision

    def source(self) -> Source:
        return ImageRows(
            self.corpus, self.keys, self.sizes, self.image_size, max_pixels=self.max_pixels, text=()
        )

    def setup(self, context: Context) -> None:
        encoder: VisionEncoder | None = None
        if self.encoder_path is not None:
            encoder = open_encoder(self.encoder_path, self.layer).to(context.device)
            gpu = context.device.type == "cuda"
            encoder.bf16 = encodes_in_bf16(self.encoder_precision, context.train, gpu)
        self.build(context, encoder)

    def build(self, context: Context, encoder: VisionEncoder | None, *, load: bool = True) -> None:
        """Build all modules around the frozen encoder.

        Args:
            load: False leaves out all files of weights, as for a plan on the meta device.
        """
        super().setup(context)
        self.memory = RowMemory(sum(self.sizes))
        self.encoder = encoder

    def frozen_modules(self) -> dict[str, nn.Module]:
        return {} if self.encoder is None else {"encoder": self.encoder}

    def make_batch(self, rows: Sequence[Row]) -> Batch:
        """`pixels` uint8 (B, 3, H, W), and `places` of the rows (`places_of`)."""
        return {"pixels": stack_pixels(rows), "places": places_of(rows)}

    def planned_batch(self, num: int) -> Batch:
        shape = (num, 3, self.image_size, self.image_size)
        return {
            "pixels": torch.randint(256, shape, dtype=torch.uint8),
            "places": [("planned", row) for row in range(num)],
        }

    def features(self, pixels: Tensor) -> Tensor:
        """Patch features of uint8 pixels: float32 (B, N, C), no gradient."""
        assert self.encoder is not None
        with torch.no_grad():
            return self.encoder(to_unit(pixels))
