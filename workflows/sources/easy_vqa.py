"""Source `easy-vqa`: 64 px pictures of one coloured shape, from its PyPI package.

See https://github.com/vzhou842/easy-VQA. It has questions but no captions: colour and shape are
derived from all answers on an image in its own split. The questions `is there no/not …` negate;
each answer narrows the set of possible values.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import Locator, Pairs, ReadBytes, Sample

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


def derive(pairs: Iterable[tuple[str, str]]) -> tuple[str | None, str | None]:
    """(colour, shape) that follow from the answers; None if several are possible.

    Raises:
        DataError: if the answers contradict each other.
    """
    pairs = list(pairs)
    colors, shapes = set(COLORS), set(SHAPES)
    for question, answer in pairs:
        words = re.findall(r"[a-z]+", question.lower())
        named = {word for word in words if word in COLORS or word in SHAPES}
        if answer in ("yes", "no"):
            holds = (answer == "yes") != ("no" in words or "not" in words)
        else:
            named = named | {answer}
            holds = True
        for possible in (colors, shapes):
            for word in named & (set(COLORS) if possible is colors else set(SHAPES)):
                possible.intersection_update({word}) if holds else possible.discard(word)
    if not colors or not shapes:
        raise DataError(f"easy-vqa: answers that contradict each other: {pairs}")
    color = colors.pop() if len(colors) == 1 else None
    shape = shapes.pop() if len(shapes) == 1 else None
    return color, shape


def describe(color: str | None, shape: str | None) -> tuple[str | None, str | None]:
    """(caption, label), such as `a blue circle`, `blue circle`.

    With only colour or shape known there is no label; with neither there is no caption either.
    """
    if color is None and shape is None:
        return None, None
    words = " ".join(word for word in (color, shape or "shape") if word)
    return f"a {words}", words if color and shape else None


@dataclass(frozen=True)
class EasyVqaGroup:
    """Some images of one split: (number, path, question-answer pairs)."""

    split: str
    images: tuple[tuple[int, str, Pairs], ...]

    @property
    def in_order(self) -> bool:
        return False

    @property
    def source(self) -> str:
        return f"easy-vqa:{self.split}"

    def samples(self) -> Iterator[Sample]:
        for index, (number, path, qa) in enumerate(self.images):
            caption, label = describe(*derive(qa))
            yield Sample(str(number), (index, 0), Path(path).read_bytes(), caption, label, qa)

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        def read(locator: Locator) -> bytes:
            return Path(self.images[locator[0]][1]).read_bytes()

        yield read


def easy_vqa_groups(source: str, section: CorpusSection, seed: int) -> list[EasyVqaGroup]:
    """Groups of `easy-vqa:train` or `easy-vqa:test`, ordered by image number.

    Raises:
        DataError: if the package is missing, or the source names no split.
    """
    _, _, split = source.partition(":")
    if split not in ("train", "test"):
        raise DataError(
            f"corpus.source: {source!r} names no split; write easy-vqa:train or easy-vqa:test."
        )
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError(
            "corpus.source: the package easy-vqa is not installed. Run `pip install -e "
            "'.[quickstart]'` (or easy-vqa)."
        ) from error
    if split == "train":
        questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    pairs: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, number in zip(*questions, strict=True):
        pairs[int(number)].append((question, answer))
    images = [(number, paths[number], tuple(pairs[number])) for number in sorted(paths)]
    size = section.shard_images
    return [EasyVqaGroup(split, tuple(images[i : i + size])) for i in range(0, len(images), size)]
