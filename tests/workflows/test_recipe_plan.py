"""The command `smalti plan` prints every stage, and refuses what cannot fit.

Covers: smalti/cli/plan.py, workflows/plan/table.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smalti.cli import main
from tests.workflows.plan.small_plans import SMALL


def test_the_command_prints_every_stage_and_refuses_what_cannot_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = [
        "plan",
        "semhitok-quickstart",
        f"out={tmp_path}",
        *SMALL,
        "--gpu",
        "a100",
        "--gpus",
        "2",
    ]
    asked += [
        "codebook.size=500000",
        "codebook.coarse=1000",
        "--vectors",
        "150e6",
        "--width",
        "1152",
        "--length",
        "100",
        "tokenizer.pixel.codes=32",
    ]
    assert main([*asked, "mllm.train.batch_size=65536", "mllm.train.micro_batch_size=32768"]) == 1
    seen = capsys.readouterr()
    assert re.search(r"features +.* GPU-hours; .* per GPU for \d+ images", seen.out)
    for part in (
        "encoder:",
        "semantic:",
        "pixel:",
        "mllm:",
        "storage:",
        "states per GPU",
        "GPU-hours",
        "ASSUMED",
    ):
        assert part in seen.out
    assert "N = 150,000,000 vectors x C = 1,152 -> K = 500,000 codes in P = 1,000 cells" in seen.out
    assert re.search(
        r"cannot fit:\n  mllm needs .*With mllm\.train\.optimizer=adamw and .*, and fits\.",
        seen.err,
    )
    assert main([*asked, "--gpus", "0"]) == 2
    assert "--gpus: expected a number of at least 1" in capsys.readouterr().err
