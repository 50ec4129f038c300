"""The scores as a plain table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from smalti.workflows.evaluation.scores.measure_result import ScoreRecord
from smalti.workflows.report.names import baseline_name, goal_met, name_of, ordered, written


def table(scores: Mapping[str, ScoreRecord], goals: Mapping[str, float] | None = None) -> str:
    """An aligned table: score, value, sample size, baselines and goal.

    Args:
        goals: goals by score, beside those that the scores carry.

    Returns:
        The table; without scores, one line that says so.
    """
    if not scores:
        return "no scores: nothing was measured"
    goals = goals or {}
    rows = [("score", "value", "n", "baselines", "goal")]
    for key in ordered(scores):
        score: ScoreRecord = {**scores[key]}
        if key in goals:
            score["goal"] = goals[key]
        kind = name_of(key).kind
        baselines = ", ".join(
            f"{baseline_name(k)} {written(v, kind)}" for k, v in score.get("baseline", {}).items()
        )
        met = goal_met(score)
        goal = (
            ""
            if met is None
            else f"{written(score['goal'], kind)} {'reached' if met else 'NOT reached'}"
        )
        rows.append((key, written(score["value"], kind), f"{score['n']:,}", baselines, goal))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    used = [column for column, name in enumerate(rows[0]) if any(row[column] for row in rows[1:])]
    lines = [
        "  ".join(_cell(row[column], widths[column], column) for column in used).rstrip()
        for row in rows
    ]
    rule = "  ".join("─" * widths[column] for column in used)
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column in (1, 2) else text.ljust(width)
