"""The result of one measure: scores, tables and pictures, and the files that hold them.

`<evaluate>/measures/<name>.json` holds a finished result, `<evaluate>/pictures/` its pictures. An
interrupted evaluation resumes with the measures that have no such file.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import numpy as np
from PIL import Image

from smalti import storage
from smalti.errors import DataError

RESULTS = "measures"
PICTURES = "pictures"
NOT_OF_THE_CODES = {
    "zero_shot/accuracy",
    "drawing/judge_accuracy",
    "retrieval/t2i_r1",
    "retrieval/i2t_r1",
}


class ScoreRecord(TypedDict):
    """A score of report.json; `goal` where the recipe sets one."""

    value: float
    n: int
    split: str
    higher_is_better: bool
    baseline: dict[str, float]
    goal: NotRequired[float]


@dataclass(frozen=True)
class Score:
    """One number of report.json.

    `n` is what it was counted on (images, questions, tokens, drawings).
    """

    value: float
    n: int
    split: str = "val"
    higher_is_better: bool = True
    baseline: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> ScoreRecord:
        """The score as plain types.

        Raises:
            DataError: if a number is NaN or Inf.
        """
        for name, number in {"the value": self.value, **self.baseline}.items():
            if not math.isfinite(number):
                raise DataError(
                    f"A measure returned a score that is not finite: {name} is {number} (n = "
                    f"{self.n}). Check the losses of the trained models in history.jsonl for NaN "
                    "or Inf."
                )
        return {
            "value": float(self.value),
            "n": self.n,
            "split": self.split,
            "higher_is_better": self.higher_is_better,
            "baseline": {k: float(v) for k, v in self.baseline.items()},
        }


@dataclass
class MeasureResult:
    """Result of one measure.

    If there was nothing to measure, it is empty and `skipped` says why.
    """

    scores: dict[str, Score] = field(default_factory=dict)
    tables: dict[str, object] = field(default_factory=dict)
    # file name without ending -> uint8 (H, W, 3)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: str | None = None


class ResultRecord(TypedDict):
    """A finished result as JSON; `version` is that of the measure's definition."""

    version: int
    scores: dict[str, ScoreRecord]
    tables: dict[str, Any]
    pictures: list[str]
    skipped: str | None


def save_result(path: str, name: str, result: MeasureResult, version: int = 1) -> ResultRecord:
    """Write the pictures, then the JSON.

    A JSON file thus means a complete result.
    """
    storage.make_dirs(storage.join(path, RESULTS))
    storage.make_dirs(storage.join(path, PICTURES))
    for key, hwc in result.pictures.items():
        storage.write_atomic(storage.join(path, PICTURES, f"{key}.png"), png(hwc))
    record: ResultRecord = {
        "version": version,
        "scores": {key: score.as_json() for key, score in result.scores.items()},
        "tables": result.tables,
        "pictures": sorted(result.pictures),
        "skipped": result.skipped,
    }
    storage.write_json(storage.join(path, RESULTS, f"{name}.json"), record)
    return record


def load_result(path: str, name: str) -> ResultRecord | None:
    """The JSON of a finished result, or None."""
    place = storage.join(path, RESULTS, f"{name}.json")
    return storage.read_json(place) if storage.exists(place) else None


def png(hwc: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(hwc)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def share(hits: Sequence[bool] | np.ndarray) -> float:
    """Mean of booleans, of which there must be at least one."""
    return float(np.mean(np.asarray(hits, dtype=np.float64)))


def merge_baselines(
    scores: Mapping[str, ScoreRecord], others: Mapping[str, Mapping[str, ScoreRecord]]
) -> dict[str, ScoreRecord]:
    """Scores with those of other runs added as `baseline.<name of the run>`.

    An equal score of the encoder or of the judge alone is left out: the runs share these models.
    """
    merged: dict[str, ScoreRecord] = {}
    for key, score in scores.items():
        beside = {name: run[key]["value"] for name, run in others.items() if key in run}
        if key in NOT_OF_THE_CODES:
            beside = {name: value for name, value in beside.items() if value != score["value"]}
        merged[key] = {**score, "baseline": score.get("baseline", {}) | beside}
    return merged
