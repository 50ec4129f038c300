"""A chart of the number of vectors per code."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from smalti.ticks import log_ticks, tick_text

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 640, 320, 56, 28, 28, 16
INK, BAR, EVEN = (40, 40, 40), (66, 114, 168), (190, 80, 40)


def sizes_picture(counts_K: Tensor, title: str) -> bytes:
    """PNG of the vectors per code.

    Codes along x, the largest first; their vectors along y on a log scale; a line at the mean.
    Codes without a vector leave the right side empty.

    Raises:
        ValueError: if no code has a vector.
    """
    sizes = np.sort(counts_K.cpu().numpy())[::-1].astype(np.float64)
    if not len(sizes) or sizes[0] <= 0:
        raise ValueError("sizes of codes without a vector cannot be drawn")
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    low, high = 0.5, max(2.0, sizes[0])

    def y(size: float) -> float:
        return TOP + tall * (1 - np.log(max(size, low) / low) / np.log(high / low))

    for column in range(wide):
        size = sizes[column * len(sizes) // wide]
        if size > 0:
            draw.line([(LEFT + column, y(size)), (LEFT + column, TOP + tall)], fill=BAR)
    for tick in log_ticks(1.0, high):
        draw.line([(LEFT - 4, y(tick)), (LEFT, y(tick))], fill=INK)
        draw.text((LEFT - 8, y(tick)), tick_text(tick), fill=INK, anchor="rm")
    draw.line([(LEFT, TOP), (LEFT, TOP + tall), (LEFT + wide, TOP + tall)], fill=INK)
    even = y(float(sizes.mean()))
    draw.line([(LEFT, even), (LEFT + wide, even)], fill=EVEN)
    draw.text((LEFT, 6), title, fill=INK)
    draw.text(
        (LEFT, HEIGHT - 20),
        f"{len(sizes):,} codes, the largest first; the line: the mean",
        fill=INK,
    )
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
