"""What stages are fingerprinted by: as before, and whatever run-only keys there are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from smalti.schema import MllmSection, Train, result_settings
from smalti.schema.base import IF_SET, LATE, RUN_ONLY, Section

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("stage_settings.py")
BEFORE = json.loads(Path(__file__).with_name("stage_settings.json").read_text())
"""Digests made from what the stages of commit 4e80432 gave `run_stage`, which five mechanisms
decided then.
"""


def settings(tree: Path) -> dict[str, dict[str, str]]:
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_stages_are_fingerprinted_by_what_they_were_before() -> None:
    assert settings(ROOT) == BEFORE


@pytest.mark.slow
def test_a_run_only_key_changes_no_fingerprint(tmp_path: Path) -> None:
    """A key for all trainings is added to a copy of the schema; a retention key once refused all
    finished artifacts.
    """
    shutil.copytree(
        ROOT / "smalti",
        tmp_path / "smalti",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for room in ("tokenizers", "mllm", "workflows", "tune", "recipes"):
        (tmp_path / room).symlink_to(ROOT / room, target_is_directory=True)
    base = tmp_path / "smalti/schema/base.py"
    text = base.read_text()
    line = '    retention: int = Field(3, description="days", json_schema_extra=RUN_ONLY)\n'
    docstring = text.index('"""', text.index("class Train(Section):"))
    place = text.index("\n", text.index('"""', docstring + 3)) + 1
    base.write_text(text[:place] + line + text[place:])
    found = settings(tmp_path)
    assert found == BEFORE
    base.write_text(text[:place] + line.replace(", json_schema_extra=RUN_ONLY", "") + text[place:])
    assert settings(tmp_path) != BEFORE, "without the mark the key is part of the fingerprints"


class Inner(Section):
    kept: int = 1
    often: int = Field(2, json_schema_extra=RUN_ONLY)


class Outer(Section):
    inner: Inner = Inner()
    several: list[Inner] = Field([], description="sections")
    newer: int = Field(0, json_schema_extra=IF_SET)
    late: int = Field(0, json_schema_extra=LATE)


def test_marks_are_read_at_any_depth() -> None:
    assert result_settings(Outer(several=[Inner(kept=5, often=9)])) == {
        "inner": {"kept": 1},
        "several": [{"kept": 5}],
    }
    assert result_settings(Outer(newer=3, late=4)) == {
        "inner": {"kept": 1},
        "several": [],
        "newer": 3,
        "late": 4,
    }
    assert result_settings(Outer(), ("inner",)) == {"several": []}
    assert "newer" in Outer().model_dump()
    assert "late" not in Outer().model_dump()


def test_a_key_may_be_run_only_in_one_section_alone() -> None:
    train = Train(micro_batch_size=4)
    assert result_settings(train)["micro_batch_size"] == 4
    assert "micro_batch_size" not in result_settings(MllmSection(train=train))["train"]
