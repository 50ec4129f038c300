"""The whole chain at toy size: every recipe with --smoke; SIGKILL in the middle of each stage and
the same command again.

Covers: workflows/export.py, workflows/systems/smoke_sizes.py.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from smalti.config import find_recipe, load_recipe, recipes_folder
from smalti.workflows.chain import baseline_recipe, stages_of

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
RECORDS = {"artifact.json", "history.jsonl", "trained.json"}  # they hold times


def command(recipe: str, out: Path, *overrides: str) -> list[str]:
    """One worker: two are in the job of test_jobs.py and in the tests of training."""
    own = [f"out={out}", "resources.workers=1", *overrides]
    return [sys.executable, "-m", "smalti", "run", recipe, "--smoke", *own]


def environment() -> dict[str, str]:
    return {
        key: value
        for key, value in os.environ.items()
        if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")
    }


def run(recipe: str, out: Path, *overrides: str) -> Path:
    """The finished output folder of a smoke run."""
    done = subprocess.run(
        command(recipe, out, *overrides),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out.with_name(out.name + "-smoke")


def contents(artifact: Path) -> dict[str, str]:
    """Hash of every file of an artifact, but for records of times and figures made from them."""
    files = (
        path for path in sorted(artifact.rglob("*")) if path.is_file() and path.name not in RECORDS
    )
    return {
        str(path.relative_to(artifact)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _fork(arguments: list[str], told: str) -> int:
    """In the process that is kept for it, which has imported the libraries: a child that runs the
    command; its pid.
    """
    import mlflow.tracking  # noqa: F401
    import ray.data  # noqa: F401

    import smalti.workflows.evaluation.stage  # noqa: F401
    from smalti.cli import main

    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(told, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        for key in set(os.environ) - set(environment()):
            del os.environ[key]
        code = main(arguments)
    finally:
        os._exit(code)


def _ended(pid: int, wait: bool) -> int | None:
    """In the process that is kept: how a child ended, None while it runs."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


@dataclass(frozen=True)
class Running:
    """A command at work, forked by `server`; what it prints is in `told`."""

    server: ProcessPoolExecutor
    pid: int
    told: Path

    def text(self) -> str:
        return self.told.read_text(errors="replace") if self.told.exists() else ""

    def ended(self, wait: bool = False) -> int | None:
        return self.server.submit(_ended, self.pid, wait).result()


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[list[str], Path], Running]]:
    """`start(command, told)`: the command in a new process, without the seconds that its imports
    take.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as server:

        def started(command: list[str], told: Path) -> Running:
            arguments = command[command.index("smalti") + 1 :]
            return Running(server, server.submit(_fork, arguments, str(told)).result(), told)

        yield started


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("semhitok-quickstart", tmp_path_factory.mktemp("unbroken") / "out")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "recipe", [name for name in RECIPES if "-quickstart" not in name and name != "semhitok-256"]
)
def test_smoke_of_a_recipe(start: Any, recipe: str, tmp_path: Path) -> None:
    """semhitok-256: as a job, in test_jobs.py. Quickstarts: below, and in test_chain_checks.py."""
    running = start(command(recipe, tmp_path / "out"), tmp_path / "told")
    assert running.ended(wait=True) == 0, running.text()[-6000:]
    assert (tmp_path / "out-smoke" / "report.html").is_file()


@pytest.mark.timeout(400)
def test_a_whole_run_leaves_every_artifact_and_the_report(unbroken: Path) -> None:
    recipe = load_recipe(find_recipe("semhitok-quickstart"))
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


def kill_in(stage: str, running: Running) -> None:
    """SIGKILL the chain some moments after `stage` began (or went on, where a kill came late
    before).
    """
    begun = re.compile(rf"^{stage}: (starting|resuming) ", re.MULTILINE)
    deadline = time.monotonic() + 120
    while (
        time.monotonic() < deadline and not begun.search(running.text()) and running.ended() is None
    ):
        time.sleep(0.1)
    assert begun.search(running.text()), f"{stage} did not start: {running.text()[-3000:]}"
    time.sleep(0.7)
    os.kill(running.pid, signal.SIGKILL)
    assert running.ended(wait=True) == -signal.SIGKILL


@pytest.mark.timeout(900)
def test_a_run_killed_in_every_stage_ends_with_the_same_artifacts(
    unbroken: Path, start: Any, tmp_path: Path
) -> None:
    recipe = load_recipe(find_recipe("semhitok-quickstart"))
    out, broken = tmp_path / "out", tmp_path / "out-smoke"
    whole_command = command("semhitok-quickstart", out, "baselines={}")
    for stage in stages_of(recipe):
        kill_in(stage, start(whole_command, tmp_path / f"{stage}.txt"))
    last = start(whole_command, tmp_path / "last.txt")
    assert last.ended(wait=True) == 0, last.text()[-6000:]
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
    recipe = load_recipe(find_recipe("semhitok-quickstart"), ["out=here"])
    baseline = baseline_recipe(recipe, "pixel_codes")
    assert baseline.share == ["here"] and baseline.out == "here/baselines/pixel_codes"
    assert not baseline.tokenizer.guidance and baseline.mllm.train == recipe.mllm.train
    assert stages_of(baseline) == [
        name for name in stages_of(recipe) if name not in ("features", "codebook")
    ]
