"""Retrieval between images and captions."""

from __future__ import annotations

import pytest

from smalti.workflows.evaluation import stage as evaluate
from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.models import Models
from tests.workflows.evaluation.planted_world import COLORS, take


def test_retrieval_is_not_taken_where_captions_repeat(planted: tuple[HeldOut, Models]) -> None:
    result = take("retrieval", planted)
    assert result.scores == {}
    assert "3 distinct captions" in (result.skipped or "")


def test_retrieval_finds_captions_of_their_own(planted: tuple[HeldOut, Models]) -> None:
    data, models = HeldOut(planted[0].job), planted[1]
    chosen = [next(row for row in planted[0].rows if row.label == color) for color in COLORS]
    vars(data)["images"] = chosen
    scores = evaluate.MEASURES["retrieval"].compute(data, models).scores
    assert scores["retrieval/i2t_r1"].value == 1.0
    assert scores["retrieval/t2i_r1"].value == 1.0
    assert scores["retrieval/t2i_r1"].baseline == {"chance": pytest.approx(1 / 3)}
