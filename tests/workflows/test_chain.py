"""The whole chain at toy size: every recipe with --smoke; SIGKILL in the middle of each stage and the same command again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import selectors
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smalti.config import find_recipe, load_recipe, recipes_folder
from smalti.workflows.chain import baseline_recipe, stages_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
RECORDS = {"artifact.json", "history.jsonl", "trained.json"}  # they hold times


def command(recipe: str, out: Path, *overrides: str) -> list[str]:
    """One worker: two are in the job of test_jobs.py and in the tests of training."""
    own = [f"out={out}", "resources.workers=1", *overrides]
    return [sys.executable, "-m", "smalti", "run", recipe, "--smoke", *own]


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}


def run(recipe: str, out: Path, *overrides: str) -> Path:
    """The finished output folder of a smoke run."""
    done = subprocess.run(command(recipe, out, *overrides), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out.with_name(out.name + "-smoke")


def contents(artifact: Path) -> dict[str, str]:
    """Hash of every file of an artifact, but for records of times and figures made from them."""
    files = (path for path in sorted(artifact.rglob("*")) if path.is_file() and path.name not in RECORDS)
    return {str(path.relative_to(artifact)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("semhitok-quickstart", tmp_path_factory.mktemp("unbroken") / "out")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("semhitok-quickstart", "semhitok-256")])
def test_smoke_of_a_recipe(recipe: str, tmp_path: Path) -> None:
    """semhitok-quickstart: below; semhitok-256: as a job, in test_jobs.py."""
    assert (run(recipe, tmp_path / "out") / "report.html").is_file()


@pytest.mark.timeout(400)
def test_a_whole_run_leaves_every_artifact_and_the_report(unbroken: Path) -> None:
    recipe = load_recipe(find_recipe("semhitok-quickstart"))
    folders = {"evaluate": "evaluation"}
    for stage in stages_of(recipe):
        record = json.loads((unbroken / folders.get(stage, stage) / "artifact.json").read_text())
        assert record["fingerprint"]
    report = json.loads((unbroken / "report.json").read_text())
    assert {"name", "version", "recipe", "machine", "started", "seconds", "stages", "scores"} <= set(report)
    assert all(entry["n"] > 0 for entry in report["scores"].values())
    assert "pixel_codes" in report["scores"]["qa/accuracy"]["baseline"]
    assert (unbroken / "mlflow.db").is_file()


@pytest.mark.timeout(200)
def test_the_same_command_again_skips_every_stage(unbroken: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.glob("*/artifact.json")}
    done = subprocess.run(
        command("semhitok-quickstart", unbroken.with_name("out")),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert done.stderr.count("skipped") >= len(before)


def kill_in(stage: str, recipe: str, out: Path) -> None:
    """Start the chain and SIGKILL it some moments after `stage` began (or went on, where a kill came late before)."""
    begun = re.compile(rf"^{stage}: (starting|going on) ", re.MULTILINE)
    with subprocess.Popen(
        command(recipe, out, "baselines={}"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as process:
        assert process.stderr is not None
        selector = selectors.DefaultSelector()
        selector.register(process.stderr, selectors.EVENT_READ)
        seen, deadline = b"", time.monotonic() + 120
        while time.monotonic() < deadline and not begun.search(seen.decode(errors="replace")):
            if selector.select(1.0):
                read = os.read(process.stderr.fileno(), 65536)
                if not read:  # it ended
                    break
                seen += read
        reached = begun.search(seen.decode(errors="replace")) is not None
        if reached:
            time.sleep(0.7)
        process.kill()
        assert reached, f"{stage} did not start: {seen.decode()[-3000:]}"


@pytest.mark.timeout(900)
def test_a_run_killed_in_every_stage_ends_with_the_same_artifacts(unbroken: Path, tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("semhitok-quickstart"))
    out = tmp_path / "out"
    for stage in [*stages_of(recipe)[:-1], "evaluation"]:
        kill_in(stage, "semhitok-quickstart", out)
    broken = run("semhitok-quickstart", out, "baselines={}")
    for stage in stages_of(recipe)[:-1]:
        assert contents(broken / stage) == contents(unbroken / stage), stage
    values = [
        {name: score["value"] for name, score in json.loads((folder / "report.json").read_text())["scores"].items()}
        for folder in (broken, unbroken)
    ]
    assert values[0] == values[1]


def test_a_baseline_shares_what_is_the_same() -> None:
    recipe = load_recipe(find_recipe("semhitok-quickstart"), ["out=here"])
    baseline = baseline_recipe(recipe, "pixel_codes")
    assert baseline.share == ["here"] and baseline.out == "here/baselines/pixel_codes"
    assert not baseline.tokenizer.guidance and baseline.mllm.train == recipe.mllm.train
    assert stages_of(baseline) == [name for name in stages_of(recipe) if name not in ("features", "codebook")]
