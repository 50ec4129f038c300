"""`tables.json`: what the report shows beside the scores."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class ClassRow(TypedDict):
    """Accuracy of one label, kind of question, or answer."""

    key: str
    n: int
    accuracy: float
    question_only: NotRequired[float]


class Example(TypedDict):
    """A question with the model's answer."""

    picture: str
    question: str
    answer: str
    given: str
    right: bool


class Drawing(TypedDict):
    """A drawn image, and what each judge saw in it."""

    picture: str
    prompt: str
    label: str | None
    seen: dict[str, str]


class GalleryRow(TypedDict):
    """Patches that share a code."""

    code: int
    patches: int
    images: int
    pictures: list[str]


class Histogram(TypedDict):
    """Uses of the codes: (rank, count) points, all codes, used ones, and tokens counted."""

    points: list[list[int]]
    codes: int
    used: int
    tokens: int


class ZeroShotTable(TypedDict):
    """Accuracy by label, and the sentence of each label."""

    classes: list[ClassRow]
    sentences: dict[str, str]


class Tables(TypedDict, total=False):
    """All tables; a measure that was not taken leaves out its own.

    A row of `grid` holds `image_id`, `caption`, `psnr`, and a picture per kind of decoding.
    """

    grid: list[dict[str, Any]]
    psnr: dict[str, float]
    histogram: Histogram
    semantic_histogram: Histogram
    gallery: list[GalleryRow]
    gallery_of: str
    zero_shot: ZeroShotTable
    questions: dict[str, list[ClassRow]]
    examples: list[Example]
    drawings: list[Drawing]
    drawing_by_label: list[ClassRow]
    skipped: dict[str, str]
