"""The whole chain at toy size; SIGKILL in the middle of each stage and the same command again.

Smoke runs of the other recipes are in systems/test_smoke_sizes.py and cluster/test_jobs.py, a run
that starts Ray itself in systems/test_fourth_system.py.

Covers: workflows/export.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from smalti.config import find_recipe, load_recipe
from smalti.workflows.chain import baseline_recipe, stages_of

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "semhitok-quickstart"
RECORDS = {"artifact.json", "history.jsonl", "trained.json"}  # they hold times


def command(out: Path, *overrides: str) -> list[str]:
    """One worker: two are in the job of test_jobs.py and in the tests of training."""
    own = [f"out={out}", "resources.workers=1", *overrides]
    return ["-m", "smalti", "run", RECIPE, "--smoke", *own]


def contents(artifact: Path) -> dict[str, str]:
    """Hash of every file of an artifact, but for records of times and figures made from them."""
    files = (
        path for path in sorted(artifact.rglob("*")) if path.is_file() and path.name not in RECORDS
    )
    return {
        str(path.relative_to(artifact)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def unbroken(
    start: Any, as_driver: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Output folder of a run without a break."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    running = start(command(out), as_driver)
    assert running.wait() == 0, running.text()[-6000:]
    return out.with_name("out-smoke")


@pytest.mark.timeout(400)
def test_a_whole_run_leaves_every_artifact_and_the_report(unbroken: Path) -> None:
    recipe = load_recipe(find_recipe(RECIPE))
    for stage in stages_of(recipe):
        record = json.loads((unbroken / stage / "artifact.json").read_text())
        assert record["fingerprint"]
    report = json.loads((unbroken / "report.json").read_text())
    assert {
        "name",
        "version",
        "recipe",
        "machine",
        "started",
        "seconds",
        "stages",
        "scores",
    } <= set(report)
    assert all(entry["n"] > 0 for entry in report["scores"].values())
    assert "pixel_codes" in report["scores"]["qa/accuracy"]["baseline"]
    assert (unbroken / "mlflow.db").is_file()


@pytest.mark.timeout(200)
def test_the_same_command_again_skips_every_stage(
    unbroken: Path, start: Any, as_driver: dict[str, str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.glob("*/artifact.json")}
    again = start(command(unbroken.with_name("out")), as_driver)
    assert again.wait() == 0, again.text()[-3000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.text().count("skipped") >= len(before)


def kill_in(stage: str, running: Any) -> None:
    """SIGKILL the chain some moments after `stage` began, or resumed where a kill came late before."""
    begun = re.compile(rf"^{stage}: (starting|resuming) ", re.MULTILINE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not begun.search(running.text()):
        assert running.poll() is None, f"it ended before {stage}: {running.text()[-3000:]}"
        time.sleep(0.1)
    assert begun.search(running.text()), f"{stage} did not start: {running.text()[-3000:]}"
    time.sleep(0.7)
    running.kill()


@pytest.mark.timeout(900)
def test_a_run_killed_in_every_stage_ends_with_the_same_artifacts(
    unbroken: Path, start: Any, as_driver: dict[str, str], tmp_path: Path
) -> None:
    """Nothing but the driver dies: the cluster outlives it."""
    recipe = load_recipe(find_recipe(RECIPE))
    out, broken = tmp_path / "out", tmp_path / "out-smoke"
    for stage in stages_of(recipe):
        kill_in(stage, start(command(out, "baselines={}"), as_driver))
    last = start(command(out, "baselines={}"), as_driver)
    assert last.wait() == 0, last.text()[-6000:]
    for stage in stages_of(recipe)[:-1]:
        assert contents(broken / stage) == contents(unbroken / stage), stage
    values = [
        {
            name: score["value"]
            for name, score in json.loads((folder / "report.json").read_text())["scores"].items()
        }
        for folder in (broken, unbroken)
    ]
    assert values[0] == values[1]


def test_a_baseline_shares_what_is_the_same() -> None:
    recipe = load_recipe(find_recipe(RECIPE), ["out=here"])
    baseline = baseline_recipe(recipe, "pixel_codes")
    assert baseline.share == ["here"] and baseline.out == "here/baselines/pixel_codes"
    assert not baseline.tokenizer.guidance and baseline.mllm.train == recipe.mllm.train
    assert stages_of(baseline) == [
        name for name in stages_of(recipe) if name not in ("features", "codebook")
    ]
