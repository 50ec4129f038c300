"""Zero-shot classes of images and of codes."""

from __future__ import annotations

import pytest

from smalti.workflows.evaluation import stage as evaluate
from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.zero_shot import ZeroShot
from tests.workflows.evaluation.planted_world import COLORS, ColorEncoder, EmbeddingTokenizer, take


def test_zero_shot_names_every_colour(planted: tuple[HeldOut, Models]) -> None:
    result = take("zero_shot", planted)
    assert result.scores["zero_shot/accuracy"].value == 1.0
    assert result.scores["zero_shot/accuracy"].baseline["most_frequent"] == pytest.approx(1 / 3)
    assert ZeroShot(planted[1]).labels == ["blue", "green", "red"]


def test_a_tokenizer_that_keeps_embeddings_is_measured_through_its_codes(
    planted: tuple[HeldOut, Models],
) -> None:
    """One of three colours is lost: a third of the images, and of the captions."""
    data, models = HeldOut(planted[0].job), Models(planted[0])
    vars(models).update(tokenizer=EmbeddingTokenizer(), encoder=ColorEncoder())
    scores = evaluate.MEASURES["zero_shot"].compute(data, models).scores
    assert scores["zero_shot/through_codes"].value == pytest.approx(2 / 3)
    assert scores["zero_shot/through_codes"].baseline == {"encoder": 1.0}
    vars(data)["images"] = [
        next(row for row in planted[0].rows if row.label == color) for color in COLORS
    ]
    scores = evaluate.MEASURES["retrieval"].compute(data, models).scores
    assert scores["retrieval/i2t_r1_through_codes"].value == pytest.approx(2 / 3)
    assert (
        scores["retrieval/i2t_r1_through_codes"].baseline["encoder"]
        == scores["retrieval/i2t_r1"].value
        == 1.0
    )
