"""An evaluation in its MLflow run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from smalti import storage
from smalti.workflows.evaluation.scores.contact_sheet import contact_sheet
from smalti.workflows.evaluation.scores.measure_result import PICTURES, ScoreRecord
from smalti.workflows.pipeline.stage import StageRun


def track(run: StageRun, scores: Mapping[str, ScoreRecord], tables: Mapping[str, Any]) -> None:
    """Log scores, baselines and three sheets of pictures to MLflow."""
    metrics = {key: score["value"] for key, score in scores.items()}
    metrics |= {
        f"{key}/baseline/{name}": v
        for key, score in scores.items()
        for name, v in score["baseline"].items()
    }
    run.tracker.metrics(metrics)
    grid = tables.get("grid", [])
    rows = {
        "reconstructions": [
            [line[kind] for kind in ("input", "semantic", "decoded") if kind in line]
            for line in grid
        ],
        "drawings": _in_rows([line["picture"] for line in tables.get("drawings", [])], 8),
        "gallery": [line["pictures"] for line in tables.get("gallery", [])],
    }
    for key, names in rows.items():
        if names:
            run.tracker.image(
                key, contact_sheet([[_picture(run.path, name) for name in row] for row in names])
            )


def _in_rows(names: list[str], width: int) -> list[list[str]]:
    return [names[start : start + width] for start in range(0, len(names), width)]


def _picture(path: str, name: str) -> np.ndarray:
    """A picture of the evaluation, uint8 (H, W, 3)."""
    with storage.open_read(storage.join(path, PICTURES, f"{name}.png")) as file:
        return np.asarray(Image.open(file).convert("RGB"))
