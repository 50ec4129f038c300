"""Prompts of the encoder stage."""

from __future__ import annotations

from collections import Counter

from smalti.workflows.encoder import prompts_of


def test_prompts_are_the_commonest_text_of_each_label() -> None:
    texts = Counter(
        {("a red ball", "ball"): 2, ("a ball", "ball"): 3, ("a cat", "cat"): 1, ("nothing", ""): 9}
    )
    assert prompts_of(texts) == {"ball": "a ball", "cat": "a cat"}
