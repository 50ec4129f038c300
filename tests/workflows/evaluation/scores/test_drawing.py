"""Drawings: both judges, the sentence of a label, and models that cannot draw.

Covers: workflows/evaluation/scores/models.py.
"""

from __future__ import annotations

import pytest
from PIL import Image
from torch import Tensor

from smalti.workflows.evaluation import stage as evaluate
from smalti.workflows.evaluation.scores.drawing import named_label
from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.models import Models
from tests.workflows.evaluation.planted_world import GRID, PALETTE, Oracle, PaletteTokenizer, take


def test_drawings_are_judged_by_both_judges(planted: tuple[HeldOut, Models]) -> None:
    result = take("drawing", planted)
    assert result.scores["drawing/accuracy"].value == pytest.approx(2 / 3)  # green comes out blue
    assert result.scores["drawing/accuracy"].n == 6
    assert result.scores["drawing/accuracy"].baseline == {
        "chance": pytest.approx(1 / 3),
        "reconstructed": 1.0,
    }
    assert result.scores["drawing/judge_accuracy"].value == 1.0
    assert result.scores["drawing/zero_shot_accuracy"].value == pytest.approx(2 / 3)
    wrong = [line for line in result.tables["drawings"] if line["seen"]["judge"] != line["label"]]
    assert {line["prompt"] for line in wrong} == {"a green block"}
    assert {line["seen"]["judge"] for line in wrong} == {"blue"}


def test_without_a_decoder_what_needs_pixels_is_skipped_with_the_reason(
    planted: tuple[HeldOut, Models],
) -> None:
    class Undecodable(PaletteTokenizer):
        has_decoder, no_decoder = False, "no decoder here"

        def decode(self, codes_BT: Tensor) -> Tensor:
            raise AssertionError("asked for pixels")

    class Drawer(Oracle):
        cannot_draw: str | None = "no decoder here"

        def decode(self, codes_BT: Tensor) -> list[Image.Image]:
            return [
                Image.fromarray(PALETTE[row.numpy().reshape(GRID)].repeat(8, 0).repeat(8, 1))
                for row in codes_BT
            ]

    models, drawer = Models(planted[0]), Drawer()
    vars(models).update(vars(planted[1]) | {"tokenizer": Undecodable(), "language": drawer})
    result = evaluate.MEASURES["drawing"].compute(planted[0], models)
    assert result.skipped == "no decoder here" and not result.scores and not result.pictures
    for name in ("codes", "questions", "zero_shot"):
        assert evaluate.MEASURES[name].compute(planted[0], models).scores
    drawer.cannot_draw = (
        None  # a diffusion decoder stands by: what is drawn is judged, reconstructions are not made
    )
    drawn = evaluate.MEASURES["drawing"].compute(planted[0], models).scores["drawing/accuracy"]
    assert (
        drawn.value == take("drawing", planted).scores["drawing/accuracy"].value
        and "reconstructed" not in drawn.baseline
    )


def test_named_label_is_the_longest_in_the_prompt() -> None:
    labels = ["circle", "blue circle", "red_fox"]
    assert named_label("a Blue circle, please", labels) == "blue circle"
    assert named_label("a red circle", labels) == "circle"
    assert named_label("The red fox!", labels) == "red_fox"
    assert named_label("circles", labels) is None
