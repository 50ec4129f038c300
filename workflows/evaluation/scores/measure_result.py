"""What one measure leaves behind: scores, tables for the report, and pictures; written as files, so it can resume.

`<evaluation>/parts/<name>.json` holds a finished part, its pictures lie in `<evaluation>/pictures/`. A part that stands
is not measured again when an evaluation goes on after a break.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from smalti import storage
from smalti.errors import DataError

PARTS, PICTURES = "parts", "pictures"
NOT_OF_THE_CODES = {"zero_shot/accuracy", "drawing/judge_accuracy", "retrieval/t2i_r1", "retrieval/i2t_r1"}


@dataclass(frozen=True)
class Score:
    """One number of report.json. `n` is what it was counted on (images, questions, tokens, drawings)."""

    value: float
    n: int
    split: str = "val"
    higher_is_better: bool = True
    baseline: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain types. Errors: DataError when a number is not finite (it would not be valid JSON, nor honest)."""
        for name, number in {"the value": self.value, **self.baseline}.items():
            if not math.isfinite(number):
                raise DataError(f"A score came out as {number} ({name}, n = {self.n}); expected a finite number.")
        return asdict(self) | {"value": float(self.value), "baseline": {k: float(v) for k, v in self.baseline.items()}}


@dataclass
class Part:
    """Result of one measure; empty when there was nothing to measure (`skipped` then says why)."""

    scores: dict[str, Score] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)  # file name without ending -> uint8 (H, W, 3)
    skipped: str | None = None


def save_part(path: str, name: str, part: Part) -> dict[str, Any]:
    """Write the pictures, then the part's JSON (in this order: a part that stands is whole); returns the JSON."""
    storage.make_dirs(storage.join(path, PARTS))
    storage.make_dirs(storage.join(path, PICTURES))
    for key, hwc in part.pictures.items():
        storage.write_atomic(storage.join(path, PICTURES, f"{key}.png"), png(hwc))
    record = {
        "scores": {key: score.as_json() for key, score in part.scores.items()},
        "tables": part.tables,
        "pictures": sorted(part.pictures),
        "skipped": part.skipped,
    }
    storage.write_json(storage.join(path, PARTS, f"{name}.json"), record)
    return record


def load_part(path: str, name: str) -> dict[str, Any] | None:
    """The JSON of a part that stands, else None."""
    place = storage.join(path, PARTS, f"{name}.json")
    return storage.read_json(place) if storage.exists(place) else None


def png(hwc: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(hwc)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def share(hits: Any) -> float:
    """Mean of booleans; the caller makes sure that there is at least one."""
    return float(np.mean(np.asarray(hits, dtype=np.float64)))


def merge_baselines(scores: dict[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Scores as JSON with the values that other runs reached added under `baseline.<name of the run>`.

    A measure of the encoder or of the judge alone is left out where it is equal: the run shares them.
    """
    merged = {}
    for key, score in scores.items():
        beside = {name: run[key]["value"] for name, run in others.items() if key in run}
        if key in NOT_OF_THE_CODES:
            beside = {name: value for name, value in beside.items() if value != score["value"]}
        merged[key] = score | {"baseline": score.get("baseline", {}) | beside}
    return merged
