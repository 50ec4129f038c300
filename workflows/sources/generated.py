"""Source `generated`: seeded pictures of coloured shapes, for smoke runs and tests."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import Locator, Pairs, ReadBytes, Sample

COLORS = {
    "red": (208, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (230, 205, 50),
    "black": (20, 20, 20),
    "purple": (140, 50, 170),
}
SHAPES = ("circle", "rectangle", "triangle")
DEFAULT_COUNT = 64


def draw(seed: int, name: str, index: int, size: int) -> tuple[bytes, str, str, Pairs]:
    """(PNG bytes, caption, label, question-answer pairs) of picture `index`.

    A pure function of its arguments.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), index])
    color, shape = list(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
    shade = int(rng.integers(200, 256))
    image = Image.new("RGB", (size, size), (shade, shade, int(rng.integers(200, 256))))
    radius = size * rng.uniform(0.2, 0.35)
    height = radius * (rng.uniform(0.5, 0.8) if shape == "rectangle" else 1.0)
    x, y = rng.uniform(radius, size - radius, 2)
    box = (x - radius, y - height, x + radius, y + height)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=COLORS[color])
    elif shape == "rectangle":
        pen.rectangle(box, fill=COLORS[color])
    else:
        pen.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=COLORS[color])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    other = list(COLORS)[rng.integers(len(COLORS))]
    pairs = (
        ("what color is the shape?", color),
        ("what shape is in the image?", shape),
        (f"is there a {other} shape?", "yes" if other == color else "no"),
    )
    return stream.getvalue(), f"a {color} {shape}", f"{color} {shape}", pairs


@dataclass(frozen=True)
class GeneratedGroup:
    """Pictures start … stop of a seed and name."""

    seed: int
    name: str
    start: int
    stop: int
    size: int

    @property
    def in_order(self) -> bool:
        return False

    @property
    def source(self) -> str:
        return f"generated:{self.name}:{self.seed}"

    def samples(self) -> Iterator[Sample]:
        for index in range(self.start, self.stop):
            data, caption, label, qa = draw(self.seed, self.name, index, self.size)
            yield Sample(str(index), (index, 0), data, caption, label, qa)

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        def read(locator: Locator) -> bytes:
            return draw(self.seed, self.name, locator[0], self.size)[0]

        yield read


def generated_groups(source: str, section: CorpusSection, seed: int) -> list[GeneratedGroup]:
    """Groups of `generated`, `generated:COUNT` or `generated:COUNT:NAME`.

    Default: 64 pictures, no name. The recipe's seed and the name determine the pictures, so that
    `generated:48` and `generated:16:val` differ.
    """
    _, _, rest = source.partition(":")
    digits, _, name = rest.partition(":")
    if rest and not digits.isdigit():
        raise DataError(
            f"corpus.source: {source!r} is not generated, generated:COUNT or generated:COUNT:NAME."
        )
    count = int(digits) if digits else DEFAULT_COUNT
    size = section.shard_images
    return [
        GeneratedGroup(abs(seed), name, start, min(start + size, count), section.image_size)
        for start in range(0, count, size)
    ]
