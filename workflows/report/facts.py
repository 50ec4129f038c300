"""What a report shows, gathered from the artifacts.

Missing parts are left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypedDict

import smalti
from smalti import storage
from smalti.artifact import Artifact
from smalti.config import dump
from smalti.schema import Recipe
from smalti.workflows.evaluation.scores.measure_result import ScoreRecord
from smalti.workflows.evaluation.scores.tables import Tables
from smalti.workflows.pipeline.stage import STAGES
from smalti.workflows.report.machine import Machine, machine

HISTORY = "history.jsonl"
EVALUATION = ("evaluate", "evaluation")  # folder names of this and of earlier versions
SCORE_KEYS = ("value", "n", "split", "higher_is_better", "baseline")


HistoryRow = dict[str, float]
"""A line of `history.jsonl`: the step, and metrics by name."""


class StageRecord(TypedDict):
    """A stage in report.json."""

    name: str
    seconds: float
    artifact: str


class ReportRecord(TypedDict):
    """report.json."""

    name: str
    version: str
    recipe: dict[str, object]
    machine: Machine
    started: str
    seconds: float
    stages: list[StageRecord]
    scores: dict[str, dict[str, object]]


@dataclass(frozen=True)
class Stage:
    """A finished stage, or a phase of one."""

    name: str
    artifact: Artifact
    history: list[HistoryRow] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """What a report is made from.

    `stages` are the recipe's own, `phases` parts of the tokenizer's time.
    """

    name: str
    recipe: dict[str, object]
    machine: Machine
    started: str
    seconds: float
    stages: list[Stage]
    phases: list[Stage]
    baselines: list[Stage]
    scores: dict[str, ScoreRecord]
    tables: Tables
    evaluation: str | None  # the folder that holds pictures/
    mlflow_uri: str | None

    def as_json(self) -> ReportRecord:
        """report.json: only what was measured; no goals, no pictures."""
        return {
            "name": self.name,
            "version": smalti.__version__,
            "recipe": self.recipe,
            "machine": self.machine,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "stages": [
                {
                    "name": stage.name,
                    "seconds": stage.artifact.seconds,
                    "artifact": stage.artifact.path,
                }
                for stage in [*self.stages, *self.baselines]
            ],
            "scores": {
                key: {name: value for name, value in score.items() if name in SCORE_KEYS}
                for key, score in self.scores.items()
            },
        }


def gather(recipe: Recipe, artifacts: Sequence[Artifact], started: float | None = None) -> Facts:
    """Facts of a run.

    Args:
        artifacts: those of its stages, in order; a stage's name is the last part of its path.
        started: when the command began, in seconds since the epoch.

    Returns:
        The facts. `seconds` is the sum over all stages, or the wall-clock time of the command if
        that is longer (start-up counts); of a resumed run, the sum over its stages.
    """
    stages = [
        Stage(_last(artifact.path), artifact, history(artifact.path)) for artifact in artifacts
    ]
    phases = [
        phase
        for stage in stages
        if stage.name == "tokenizer"
        for phase in _phases(stage.artifact.path)
    ]
    baselines = _baseline_stages(recipe)
    work = sum(stage.artifact.seconds for stage in [*stages, *baselines])
    evaluation = next((stage.artifact for stage in stages if stage.name in EVALUATION), None)
    return Facts(
        name=recipe.name,
        recipe=dump(recipe),
        machine=machine(),
        started=_started(stages, started),
        seconds=max(work, time.time() - started if started else 0.0),
        stages=stages,
        phases=phases,
        baselines=baselines,
        scores=dict(evaluation.scores) if evaluation else {},
        tables=_tables(evaluation),
        evaluation=evaluation.path if evaluation else None,
        mlflow_uri=_mlflow_uri(recipe),
    )


def history(path: str) -> list[HistoryRow]:
    """Rows of a training's `history.jsonl`; empty if the stage trains nothing.

    A truncated last line is left out.
    """
    place = storage.join(path, HISTORY)
    if not storage.exists(place):
        return []
    lines = [
        line
        for line in storage.read_bytes(place).decode("utf-8", "replace").splitlines()
        if line.strip()
    ]
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return rows


def _phases(path: str) -> list[Stage]:
    folder = storage.join(path, "phases")
    found = []
    for name in ("semantic", "pixel", "decoder", "dual"):
        artifact = Artifact.find(storage.join(folder, name))
        if artifact is not None:
            found.append(Stage(f"tokenizer/{name}", artifact, history(artifact.path)))
    return found


def _baseline_stages(recipe: Recipe) -> list[Stage]:
    """Stages that the baseline runs computed, without those they share with the recipe."""
    found = []
    for name in recipe.baselines:
        for stage in (*STAGES[:-1], *EVALUATION):
            artifact = Artifact.find(
                storage.join(storage.absolute(recipe.out), "baselines", name, stage)
            )
            if artifact is not None:
                found.append(Stage(f"baselines/{name}/{stage}", artifact, history(artifact.path)))
    return found


def _tables(evaluation: Artifact | None) -> Tables:
    if evaluation is None:
        return {}
    place = storage.join(evaluation.path, "tables.json")
    return storage.read_json(place) if storage.exists(place) else {}


def _started(stages: Sequence[Stage], started: float | None) -> str:
    """Start of the run as ISO time (UTC).

    The command's start, or that of the first stage if it was finished before.
    """
    times = [started] if started else []
    for stage in stages:
        if stage.artifact.created:
            made = datetime.fromisoformat(stage.artifact.created)
            times.append(
                (made if made.tzinfo else made.replace(tzinfo=UTC)).timestamp()
                - stage.artifact.seconds
            )
    return datetime.fromtimestamp(min(times) if times else time.time(), UTC).isoformat(
        timespec="seconds"
    )


def _mlflow_uri(recipe: Recipe) -> str | None:
    if recipe.tracking.uri == "off":
        return None
    return recipe.tracking.uri or f"sqlite:///{storage.absolute(recipe.out)}/mlflow.db"


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
