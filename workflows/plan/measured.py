"""Measured memory and time of stages, as ratios to their plans, from `bench/results`."""

from __future__ import annotations

import json
from pathlib import Path

import smalti

RESULTS = Path(smalti.__file__).resolve().parents[1] / "bench" / "results"
GOAL = 16  # bench/16_plan.py


def measurements(folder: Path = RESULTS) -> dict[str, str]:
    """The newest ratios of each stage, as text; empty without results.

    Results are what `python -m bench` writes; the entry of goal 16 holds {"stages": {name:
    {"memory", "seconds"}}}, ratios of a small model of the stage.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        for entry in json.loads(path.read_text()):
            if isinstance(entry, dict) and entry.get("goal") == GOAL:
                where = f"small model, {path.stem[:10]}, {entry.get('machine', 'unknown machine')}"
                found |= {name: _text(ratios, where) for name, ratios in entry["stages"].items()}
    return found


def _text(ratios: dict[str, float], where: str) -> str:
    parts = [f"{what} {ratio:.2f}" for what, ratio in ratios.items()]
    return f"{' and '.join(parts)} times the plan ({where})"
