from __future__ import annotations

from pathlib import Path

import pytest

from smalti.cli import doctor, main
from smalti.config import load_recipe


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_that_runs_these_tests_is_ready(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--out", str(tmp_path / "not" / "yet")]) == 0
    text = capsys.readouterr().out
    for part in ("software", "machine", "cluster", "data", "torch", "g++", "cores", "GiB", str(tmp_path), "ready"):
        assert part in text
    assert not (tmp_path / "not").exists()


def test_what_is_missing_is_named_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    assert main(["doctor"]) == 1
    seen = capsys.readouterr()
    assert "apt-get install g++" in seen.out
    assert "pip install ninja" in seen.out
    assert seen.err == "smalti: error: 2 to mend before smalti can run: g++, ninja\n"


def test_a_package_that_differs_from_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_lock", lambda path: {"numpy": "0.1", "torch": "2.13.0"})
    lines = [check.line() for check in doctor._packages()]
    assert any("other versions than tested: numpy" in line and "(lock: 0.1)" in line for line in lines)
    monkeypatch.setattr(doctor, "NEEDED", ("numpy", "no-such-package"))
    assert [check.state for check in doctor._packages() if "no-such-package" in check.found] == ["problem"]


def test_the_lock_is_read() -> None:
    lock = doctor.read_lock(doctor.ROOT / "requirements.lock")
    assert lock["torch"].startswith("2.")
    assert lock["pyyaml"]
    assert doctor.read_lock(Path("/nowhere")) == {}


def test_a_token_that_is_missing_and_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (check,) = doctor._ray()
    assert (check.state, check.mend) == ("problem", "ray get-auth-token --generate")


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--out", "/proc/none"]) == 1
    assert "writing" in capsys.readouterr().err


def test_an_address_that_takes_jobs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    (check,) = doctor._ray()
    assert check.state == "note" and "ray job submit" in check.found


def test_room_for_a_recipe_on_this_machine_alone() -> None:
    from smalti.cli.doctor_cluster import local_room

    assert [check.state for check in local_room(load_recipe("semhitok-quickstart", []))] == ["ok"]
    wanted = load_recipe("semhitok-quickstart", ["resources.gpus_per_worker=64"])
    checks = local_room(wanted)
    assert {check.state for check in checks} == {"problem"}
    assert "no node has that" in checks[0].found and checks[0].mend.startswith("Lower resources.cpus_per_worker")
