"""Decoded images of corpus shards."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from smalti import images, shards
from smalti.errors import DataError, ImageError
from smalti.schema import Recipe
from smalti.workflows.pipeline.timings import PROCESS_TALLY


class LoadedShard(NamedTuple):
    """A corpus shard as a reader hands it to a model: some columns, and uint8 (rows, S, S, 3)."""

    key: str
    table: pa.Table
    pixels: np.ndarray


def load_pixels(
    corpus: str, key: str, size: int, max_pixels: int, columns: list[str]
) -> tuple[pa.Table, np.ndarray]:
    """Some columns of a corpus shard, and its decoded images.

    Returns:
        The table without `image`, and the pixels: uint8 (rows, size, size, 3).

    Raises:
        DataError: if an image can no longer be decoded.
    """
    with PROCESS_TALLY.part("read"):
        table = shards.read_shard(corpus, key, [*columns, "image"])
    pixels = np.empty((table.num_rows, size, size, 3), np.uint8)
    with PROCESS_TALLY.part("decode"):
        for row, data in enumerate(table.column("image")):
            try:
                pixels[row] = images.to_pixels(data.as_py(), size, max_pixels=max_pixels)
            except ImageError as error:
                identity = table.column("image_id")[row].as_py()
                raise DataError(
                    f"{shards.shard_path(corpus, key)}: image {identity}: {error}. Create the "
                    "corpus again."
                ) from error
    return table.drop_columns(["image"]), pixels


def block_bytes(recipe: Recipe, image_size: int) -> int:
    """Bytes of the decoded pixels of a full shard."""
    return recipe.corpus.shard_images * image_size**2 * 3
