"""`ray job submit --working-dir . -- python -m smalti run …` against a real head with token
authentication.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[3]
RAY = str(Path(sys.executable).with_name("ray"))
BARE = {"PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_TOKEN"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """Environment of a client of a local head; the head and all its children end with the fixture."""
    folder = Path(tempfile.mkdtemp(prefix="rayhead"))  # short: Ray puts sockets below it
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    env = {key: value for key, value in os.environ.items() if key not in BARE}
    env["PATH"] = (
        f"{Path(RAY).parent}{os.pathsep}{env['PATH']}"  # as in an activated environment: jobs call `python`
    )
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    gcs, dashboard, agent, client_server = (_free_port() for _ in range(4))
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        f"--port={gcs}",
        "--dashboard-host=127.0.0.1",
        "--num-cpus=2",
    ]
    command += [
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={folder}",
    ]
    command += [
        "--object-store-memory=150000000",
        "--node-ip-address=127.0.0.1",
        f"--ray-client-server-port={client_server}",
    ]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    client = env | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        _wait_for_jobs_api(client, process, folder / "head.log")
        yield client
    finally:
        # the head and all that it started are one group of their own
        for ending in (
            signal.SIGTERM,
            signal.SIGKILL,
        ):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, ending)
                process.wait(5)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_jobs_api(env: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if subprocess.run([RAY, "job", "list"], env=env, capture_output=True).returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(f"the head did not come up:\n{log.read_text()[-3000:]}")


def test_a_job_without_the_token_is_refused(head: dict[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    command = [RAY, "job", "submit", "--no-wait", "--", "true"]
    done = subprocess.run(
        command, env=head | {"RAY_AUTH_TOKEN_PATH": str(wrong)}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "authentication" in (done.stdout + done.stderr).lower()


@pytest.mark.timeout(400)
def test_the_documented_command_runs_the_paper_recipe_small(
    head: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "semhitok"
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "smalti"]
    command += ["run", "recipes/semhitok-256.yaml", "--smoke", f"out={out}"]
    done = subprocess.run(command, env=head, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    report = json.loads((tmp_path / "semhitok-smoke" / "report.json").read_text())
    assert next(stage["name"] for stage in report["stages"]) == "corpus"
    assert report["scores"]["reconstruction/psnr"]["n"] > 0
