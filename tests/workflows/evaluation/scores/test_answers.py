"""Answers: normalised texts, kinds, and accuracy by kind."""

from __future__ import annotations

import pytest

from smalti.workflows.evaluation.scores.answers import (
    QuestionOnly,
    answer_kind,
    breakdown,
    normalise,
    opening,
    same_answer,
)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Yes.", "yes"),
        ("  The   Blue circle! ", "blue circle"),
        ("3.5", "3.5"),
        ("-2", "-2"),
        ("t-shirt,", "t-shirt"),
        ("50%", "50%"),
        ("a", "a"),  # an article alone is an answer (a letter), not nothing
        ("?!", "?!"),
        ("Ärger", "ärger"),
    ],
)
def test_normalise(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_different_answers_stay_different() -> None:
    assert same_answer("a teal circle", "Teal circle.")
    assert not same_answer("teal", "teal circle")
    assert not same_answer("", "yes")
    assert not same_answer("-2", "2")


def test_answer_kinds_and_openings() -> None:
    assert [answer_kind(text) for text in ("Yes", "no.", "12", "3.5", "teal")] == [
        "yes / no"
    ] * 2 + ["number"] * 2 + ["other"]
    assert opening("What colour is it?") == "what colour"
    assert opening("Why?") == "why"


def test_question_only_gives_the_most_frequent_answer_of_the_question() -> None:
    guesser = QuestionOnly()
    assert guesser.answer("anything?") is None
    guesser.learn(
        [("What color?", "red"), ("what color", "Red."), ("What color?", "blue"), ("Is it?", "yes")]
        + [("Is?", "no")] * 9
    )
    assert guesser.answer("WHAT COLOR?") == "red"
    assert guesser.answer("Is it?") == "yes"
    assert guesser.answer("never seen") == "no"  # the most frequent answer of all
    guesser.learn([("tie", "b"), ("tie", "a")])
    assert guesser.answer("tie") == "a"  # the order of the data must not decide


def test_breakdown_counts_every_question_once() -> None:
    keys = ["x"] * 6 + ["y"] * 3 + ["z", "w", "v"]
    hits = [True, True, True, False, False, False] + [True] * 3 + [False, True, False]
    rows = breakdown(keys, hits, [False] * len(keys), most=2)
    assert [row["key"] for row in rows] == ["x", "y", "all others"]
    assert [row["n"] for row in rows] == [6, 3, 3]
    assert [row["accuracy"] for row in rows] == [0.5, 1.0, pytest.approx(1 / 3)]
    assert all(row["question_only"] == 0 for row in rows)
    assert "question_only" not in breakdown(keys, hits, None)[0]
