"""Sections about the run: stages, curves, corpus, recipe, artifacts, MLflow."""

from __future__ import annotations

from typing import TypeGuard

import yaml

from smalti.workflows.report.charts import line_chart
from smalti.workflows.report.facts import Facts, HistoryRow, Stage
from smalti.workflows.report.markup import clip, escape, figure, section, table
from smalti.workflows.report.names import duration

NO_CURVE = {
    "step",
    "epoch",
    "time",
    "seconds",
    "samples",
    "tokens",
    "elapsed_s",
    "step_s",
    "samples_per_s",
    "wall_s",
}
NO_CURVE |= {"skipped_steps"}
MOST_CURVES = 6
TOLD_COUNTS = 4


def stages(facts: Facts) -> str:
    """The stages with bars for their time, the tokenizer's phases below it."""
    longest = (
        max([stage.artifact.seconds for stage in [*facts.stages, *facts.baselines]], default=0.0)
        or 1.0
    )
    rows = []
    for stage in facts.stages:
        rows.append(_stage_row(stage, longest))
        if stage.name == "tokenizer":
            rows += [_stage_row(phase, longest, inner=True) for phase in facts.phases]
    rows += [_stage_row(stage, longest, inner=True) for stage in facts.baselines]
    work = sum(stage.artifact.seconds for stage in [*facts.stages, *facts.baselines])
    lead = f"{duration(facts.seconds)} in all"
    if facts.seconds - work > 0.5:
        lead += f", {duration(work)} of it in the stages and the rest in starting up and reporting"
    lead += ". Indented: phases (part of the tokenizer's time) and the stages of the baselines."
    return section(
        "run",
        "What ran, and how long",
        lead,
        table(["stage", "time", "", "made"], rows, (1,), "stages"),
    )


def _stage_row(stage: Stage, longest: float, inner: bool = False) -> list[str]:
    counts = [
        f"{value:,} {name.replace('_', ' ')}"
        for name, value in stage.artifact.counts.items()
        if "/" not in name
    ]
    made = escape(", ".join(counts[:TOLD_COUNTS]))
    width = max(0.4, 100 * stage.artifact.seconds / longest)
    css = ' class="inner"' if inner else ""
    name = f"<span{css}>{escape(stage.name)}</span>"
    return [
        name,
        duration(stage.artifact.seconds),
        f'<span class="bar long"><span style="width:{width:.1f}%"></span></span>',
        made,
    ]


def curves(facts: Facts) -> str:
    """Metrics of each training over its steps."""
    blocks = []
    for stage in [*facts.stages, *facts.phases, *facts.baselines]:
        charts = []
        for metric in _metrics(stage.history):
            points = [
                (float(row["step"]), float(row[metric]))
                for row in stage.history
                if _is_number(row.get(metric))
            ]
            chart = line_chart(points, metric)
            if chart:
                charts.append(figure(chart, f"<b>{escape(metric)}</b>", "card chart"))
        if charts:
            blocks.append(
                f'<h3>{escape(stage.name)}</h3><div class="grid third">{"".join(charts)}</div>'
            )
    lead = "What each training logged, over its optimizer steps. The dot is the last value."
    return section("curves", "Training curves", lead, "".join(blocks))


def _metrics(history: list[HistoryRow]) -> list[str]:
    """The metrics that get a chart, losses and qualities first.

    Each has at least two numbers; at most `MOST_CURVES` are returned.
    """
    seen: dict[str, int] = {}
    for row in history:
        if "step" in row:
            for name, value in row.items():
                seen[name] = seen.get(name, 0) + _is_number(value)
    names = [
        name
        for name, count in seen.items()
        if count > 1 and name not in NO_CURVE and not name.endswith("_s")
    ]
    telling = ("loss", "psnr", "accuracy", "perplexity")

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        return name != "loss", not any(word in name for word in telling), name == "lr", name

    return sorted(names, key=rank)[:MOST_CURVES]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def corpus(facts: Facts) -> str:
    """Images read, kept and left out, with the reasons."""
    stage = next((stage for stage in facts.stages if stage.name == "corpus"), None)
    if stage is None:
        return ""
    counts = stage.artifact.counts
    plain = [
        [escape(name.replace("_", " ")), f"{value:,}"]
        for name, value in counts.items()
        if "/" not in name
    ]
    reasons = {
        name.partition("/")[2]: value
        for name, value in counts.items()
        if name.startswith("quarantined/")
    }
    body = table(["count", "images"], plain, (1,), "plain")
    if reasons:
        lines = [
            [escape(name), f"{value:,}"]
            for name, value in sorted(reasons.items(), key=lambda item: -item[1])
        ]
        body += table(["left out because", "images"], lines, (1,), "plain")
    source = stage.artifact.config.get("source")
    lead = (
        f"Read from <code>{escape(clip(str(source), 200))}</code>. What could not be used lies "
        "in <code>quarantine/</code>, with its reason."
    )
    return section("corpus", "Corpus", lead, f'<div class="grid third tables">{body}</div>')


def recipe(facts: Facts) -> str:
    """The recipe in full, with every default."""
    text = yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True, width=100)
    body = f"<details><summary>Every key of the recipe</summary><pre>{escape(text)}</pre></details>"
    return section(
        "recipe", "Recipe", "With these settings the same command creates the same artifacts.", body
    )


def fingerprints(facts: Facts) -> str:
    """Where each artifact lies, its fingerprint and its code version; package versions."""
    rows = []
    for stage in [*facts.stages, *facts.phases, *facts.baselines]:
        made = stage.artifact
        rows.append(
            [
                escape(stage.name),
                f"<code>{escape(made.fingerprint)}</code>",
                f"<code>{escape(made.code_version)}</code>",
                f"<code>{escape(made.path)}</code>",
            ]
        )
    versions = ", ".join(f"{name} {version}" for name, version in facts.machine["versions"].items())
    body = table(["artifact", "fingerprint", "code", "place"], rows, css="plain prints")
    body += f'<p class="aside">{escape(versions)}</p>' if rows else ""
    lead = (
        "A fingerprint covers an artifact's settings and those of all artifacts that it depends on."
    )
    return section("artifacts", "Artifacts", lead, body)


def mlflow(facts: Facts) -> str:
    """How to open the run in MLflow."""
    uri = facts.mlflow_uri
    if uri is None:
        return ""
    if uri.startswith(("http", "databricks")):
        body = f"<p>The run is on the tracking server <code>{escape(uri)}</code>.</p>"
    else:
        body = (
            f"<pre>mlflow ui --backend-store-uri {escape(uri)}</pre><p>Then open the address "
            "that it prints.</p>"
        )
    lead = (
        "Parameters, metrics, pictures and fingerprints are also in MLflow: one run for the "
        "recipe, a child run for each stage."
    )
    return section("mlflow", "MLflow", lead, body)
