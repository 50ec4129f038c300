"""Texts and question-answer pairs of a record."""

from __future__ import annotations

import pytest

from smalti.workflows.pipeline.timings import PROCESS_TALLY
from smalti.workflows.sources.base import clean_text, read_pairs


def test_texts_and_pairs() -> None:
    assert clean_text(["", " a \n b "]) == "a b"
    assert clean_text(float("nan")) is None
    assert read_pairs({"question": ["a", "b"], "answer": ["c", "d"]}) == (("a", "c"), ("b", "d"))
    assert clean_text({"lang": "en", "text": " a  b"}) == "a b" and clean_text({"raw": 1}) is None
    assert read_pairs({"question": "a", "answers": ["b"]}) == (), "a table of another kind"
    PROCESS_TALLY.drain()
    assert read_pairs({"question": ["a", "b"], "answer": [None, "c"], "qa": [["d", ""]]}) == (
        ("b", "c"),
    )
    assert PROCESS_TALLY.drain() == {"left_out/half_pairs": 2}
    with pytest.raises(ValueError, match="qa holds"):
        read_pairs({"qa": ["wrong"]})
