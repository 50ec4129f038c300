"""Questions: accuracy beside the question-only answer."""

from __future__ import annotations

import pytest

from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.models import Models
from tests.workflows.evaluation.planted_world import take


def test_questions_are_scored_beside_the_question_only_answer(
    planted: tuple[HeldOut, Models],
) -> None:
    result = take("questions", planted)
    score = result.scores["qa/accuracy"]
    assert score.n == 90
    assert score.value == pytest.approx((45 + 15) / 90)  # every colour, and `yes` where it is red
    # blue (ties: alphabet), no
    assert score.baseline["question_only"] == pytest.approx((15 + 30) / 90)
    kinds = {row["key"]: row for row in result.tables["questions"]["by_kind"]}
    assert kinds["other"]["accuracy"] == 1.0
    assert kinds["yes / no"]["accuracy"] == pytest.approx(1 / 3)
    examples = result.tables["examples"]
    assert sum(not line["right"] for line in examples) == 12
    assert all(
        line["given"] == "yes" and line["answer"] == "no" for line in examples if not line["right"]
    )
