"""Goals and numbers as the report writes them."""

from __future__ import annotations

from smalti.workflows.report.names import duration, goal_met, ordered, written


def test_goals_follow_the_direction_of_a_score() -> None:
    assert goal_met({"value": 1.0}) is None
    assert goal_met({"value": 1.0, "goal": 1.0}) is True
    assert goal_met({"value": 2.0, "goal": 1.0, "higher_is_better": False}) is False


def test_numbers_are_written_for_people() -> None:
    assert [written(0.91349, "share"), written(24.4, "dB"), written(2.0, "nats")] == [
        "91.3 %",
        "24.40 dB",
        "2.00 nats",
    ]
    assert [written(x, "plain") for x in (0.87, 13.14, 196608.0)] == ["0.870", "13.1", "196,608"]
    assert [duration(x) for x in (8.26, 59.99, 60, 245, 3599.7, 11520)] == [
        "8.3 s", "60.0 s", "1 min 00 s", "4 min 05 s", "1 h 00 min", "3 h 12 min",
    ]  # fmt: skip
    assert ordered({"b": 1, "a": 1, "codes/vrr": 1, "qa/accuracy": 1}) == [
        "qa/accuracy",
        "codes/vrr",
        "a",
        "b",
    ]
