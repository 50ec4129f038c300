"""easy-vqa: colour and shape from the answers."""

from __future__ import annotations

import pytest

from smalti.errors import DataError
from smalti.workflows.sources.easy_vqa import derive, describe
from tests.workflows.sources.written import collect


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("what color is the shape?", "blue")], ("blue", None)),
        ([("what is the blue shape?", "rectangle")], ("blue", "rectangle")),
        ([("what color is the circle?", "red")], ("red", "circle")),
        (
            [("is there a teal shape?", "yes"), ("does the image contain a circle?", "yes")],
            ("teal", "circle"),
        ),
        ([("is there not a circle?", "no")], (None, "circle")),
        ([("is no gray shape present?", "yes")], (None, None)),
        ([("is there a circle?", "no"), ("is there not a triangle?", "yes")], (None, "rectangle")),
    ],
)
def test_easy_vqa_answers_imply_colour_and_shape(
    pairs: list[tuple[str, str]], expected: tuple[str | None, str | None]
) -> None:
    assert derive(pairs) == expected


def test_easy_vqa_contradiction_and_description() -> None:
    with pytest.raises(DataError, match="contradict"):
        derive([("is there a circle?", "no"), ("what is the red shape?", "circle")])
    assert describe("blue", "circle") == ("a blue circle", "blue circle")
    assert describe("blue", None) == ("a blue shape", None)
    assert describe(None, "circle") == ("a circle", None)
    assert describe(None, None) == (None, None)


def test_easy_vqa_as_published() -> None:
    """5,000 pictures, 48,248 questions; 3,578 and 888 get both words (counted by a separate
    script).
    """
    pytest.importorskip("easy_vqa")
    for split, images, questions, both in (
        ("train", 4000, 38_575, 3578),
        ("test", 1000, 9673, 888),
    ):
        samples, lost = collect(f"easy-vqa:{split}")
        assert (len(samples), len(lost)) == (images, 0)
        assert sum(len(one.qa) for one in samples) == questions
        assert sum(one.label is not None for one in samples) == both
    with pytest.raises(DataError, match="easy-vqa:train or easy-vqa:test"):
        collect("easy-vqa")
