"""Measured ratios beside a plan."""

from __future__ import annotations

import json
from pathlib import Path

from smalti.workflows.plan.measured import measurements


def test_the_newest_measurement_stands_beside_the_plan(tmp_path: Path) -> None:
    entry = {"goal": 16, "machine": "box", "stages": {"mllm": {"memory": 1.0, "seconds": 1.31}}}
    (tmp_path / "2026-01-01-box.json").write_text(json.dumps([{"goal": 8}, entry]))
    entry["stages"] = {"mllm": {"memory": 1.02, "seconds": 1.4}}
    (tmp_path / "2026-01-02-box.json").write_text(json.dumps([entry]))
    told = "memory 1.02 and seconds 1.40 times the plan (small model, 2026-01-02, box)"
    assert measurements(tmp_path) == {"mllm": told}
    assert measurements(tmp_path / "none") == {}
