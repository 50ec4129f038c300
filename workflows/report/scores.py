"""The headline figures and the table of scores."""

from __future__ import annotations

from smalti.workflows.evaluation.scores.measure_result import ScoreRecord
from smalti.workflows.report.facts import Facts
from smalti.workflows.report.markup import escape, section, table
from smalti.workflows.report.names import (
    HEADLINES,
    Kind,
    baseline_name,
    goal_met,
    name_of,
    ordered,
    written,
)


def headlines(facts: Facts) -> str:
    """Up to four tiles with the main scores and their baselines."""
    tiles = []
    for key in [key for key in HEADLINES if key in facts.scores][:4]:
        score = facts.scores[key]
        name = name_of(key)
        baselines = "".join(
            f"<li>{escape(baseline_name(k))} <b>{written(v, name.kind)}</b></li>"
            for k, v in score["baseline"].items()
        )
        tiles.append(
            f'<div class="tile"><h3>{escape(name.title)}</h3><p '
            f'class="big">{written(score["value"], name.kind)}</p>'
            f"{_goal(score, name.kind)}<ul>{baselines}</ul></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def scores(facts: Facts) -> str:
    """Every score with its sample size, its baselines and its goal."""
    rows = []
    for key in ordered(facts.scores):
        score = facts.scores[key]
        name = name_of(key)
        baselines = "".join(
            f'<span class="beside">{escape(baseline_name(k))} <b>{written(v, name.kind)}</b></span>'
            for k, v in score["baseline"].items()
        )
        title = f'<span class="score">{escape(name.title)}</span><code>{escape(key)}</code>'
        title += f'<span class="note">{escape(name.meaning)}</span>' if name.meaning else ""
        value = f"<b>{written(score['value'], name.kind)}</b>{_bar(score, name.kind)}"
        rows.append([title, value, baselines, f"{score['n']:,}", _goal(score, name.kind)])
    head = ["measure", "value", "baselines", "n", "goal"]
    used = [column for column in range(len(head)) if column < 2 or any(row[column] for row in rows)]
    body = table(
        [head[i] for i in used],
        [[row[i] for i in used] for row in rows],
        [used.index(3)] if rows else [],
        "scores",
    )
    skipped = facts.tables.get("skipped", {})
    if skipped:
        reasons = "; ".join(
            f"{name.replace('_', ' ')} ({reason})" for name, reason in skipped.items()
        )
        body += f'<p class="aside">Not measured: {escape(reasons)}.</p>'
    lead = (
        "Measured on held-out data only; <i>n</i> is the sample size. A tick on a bar is a "
        "baseline: an answer without the image, chance, or the same chain with another vocabulary."
    )
    return section("scores", "Scores", lead, body)


def _bar(score: ScoreRecord, kind: Kind) -> str:
    """A bar for a share in [0, 1], with a tick for each baseline."""
    if kind != "share":
        return ""

    def percent(value: float) -> str:
        return f"{100 * min(max(value, 0.0), 1.0):.2f}%"

    ticks = "".join(
        f'<i style="left:{percent(value)}"></i>' for value in score["baseline"].values()
    )
    return f'<span class="bar"><span style="width:{percent(score["value"])}"></span>{ticks}</span>'


def _goal(score: ScoreRecord, kind: Kind) -> str:
    met = goal_met(score)
    if met is None:
        return ""
    sign = "≥" if score.get("higher_is_better", True) else "≤"
    css, word = ("met", "reached") if met else ("unmet", "not reached")
    return f'<span class="goal {css}">goal {sign} {written(score["goal"], kind)}: {word}</span>'
