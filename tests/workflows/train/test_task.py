"""Seeds of samples."""

from __future__ import annotations

from smalti.workflows.train.task import Row, seed_of


def test_a_sample_draws_the_same_numbers_wherever_it_is_read() -> None:
    row = Row(17, 0, "train/00003", 4, {})
    assert row.random(1).random() == Row(17, 5, "other", 0, {}).random(1).random()
    assert row.random(1).random() != row.random(2).random()
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3) != seed_of(1, 3, 2)
    assert seed_of(-5, 2) >= 0
