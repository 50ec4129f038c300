"""What smalti doctor reports.

Covers: smalti/cli/check.py, smalti/cli/doctor.py, smalti/cli/doctor_cluster.py,
workflows/cluster/checks.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smalti.cli import doctor, doctor_cluster, main
from smalti.config import load_recipe
from smalti.workflows.cluster.checks import PACKAGES, NodeFacts, refused


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_that_runs_these_tests_is_ready(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["doctor", "--out", str(tmp_path / "not" / "yet")]) == 0
    text = capsys.readouterr().out
    for part in (
        "software",
        "machine",
        "cluster",
        "data",
        "torch",
        "g++",
        "cores",
        "GiB",
        str(tmp_path),
        "ready",
    ):
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
    assert seen.err == "smalti: error: 2 to fix before smalti can run: g++, ninja\n"


def test_a_package_that_differs_from_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_lock", lambda path: {"numpy": "0.1", "torch": "2.13.0"})
    lines = [check.line() for check in doctor._packages()]
    assert any(
        "other versions than tested: numpy" in line and "(lock: 0.1)" in line for line in lines
    )
    monkeypatch.setattr(doctor, "NEEDED", ("numpy", "no-such-package"))
    assert [check.state for check in doctor._packages() if "no-such-package" in check.found] == [
        "problem"
    ]


def test_the_lock_is_read() -> None:
    lock = doctor.read_lock(doctor.ROOT / "requirements.lock")
    assert lock["torch"].startswith("2.")
    assert lock["pyyaml"]
    assert doctor.read_lock(Path("/nowhere")) == {}


def test_a_token_that_is_missing_and_a_cluster_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (check,) = doctor._ray()
    assert (check.state, check.fix) == ("problem", "ray get-auth-token --generate")


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
    assert "no node has that" in checks[0].found and checks[0].fix.startswith(
        "Lower resources.cpus_per_worker"
    )


def facts(host: str, **seen: Any) -> NodeFacts:
    """What a node named `host` answered, `seen` apart from the others."""
    versions = dict.fromkeys(PACKAGES, "1.0")
    usual = NodeFacts(host, host, "3.11.7", versions, 0.0, 0, "", {"/tmp": 50 * 2**30}, "")
    return replace(usual, **seen)


def test_versions_that_differ_between_nodes() -> None:
    assert [check.state for check in doctor_cluster._versions([facts("a"), facts("b")])] == ["ok"]
    other = facts("b", python="3.12.1", packages=dict.fromkeys(PACKAGES, "1.0") | {"torch": "2.0"})
    checks = doctor_cluster._versions([facts("a"), other, facts("c")])
    assert [(check.name, check.state) for check in checks] == [
        ("python on nodes", "problem"),
        ("torch on nodes", "problem"),
    ]
    assert checks[1].found == "1.0 on a, c; 2.0 on b" and "requirements.lock" in checks[1].fix


def test_a_node_that_does_not_answer() -> None:
    check = doctor_cluster._answers([facts("a")], ["0123abc"])
    assert (check.state, check.found) == ("problem", "1 did not answer: 0123abc")
    assert doctor_cluster._answers([facts("a"), facts("b")], []).found == "2 answered: a, b"


def test_a_disk_that_is_nearly_full() -> None:
    low = facts("b", free_bytes={"/tmp": 50 * 2**30, "/nvme/ray-spill": 2**30})
    (check,) = doctor_cluster._disk([facts("a"), low])
    assert (check.state, check.found) == ("missing", "b:/nvme/ray-spill has 1.0 GiB")


def test_an_output_folder_that_is_another_one_elsewhere() -> None:
    seen = [facts("a"), facts("b")]
    (check,) = doctor_cluster._storage("/data/out", seen, {"b": ["a"]})
    assert (check.state, check.found) == ("problem", "b does not see what a wrote")
    (check,) = doctor_cluster._storage(
        "/data/out", [facts("a"), facts("b", wrote="Permission denied")], {}
    )
    assert (check.state, check.found) == ("problem", "b: Permission denied")
    assert doctor_cluster._storage("/data/out", seen, {})[0].state == "ok"


def test_gpus_that_ray_offers_too_many_or_too_few_of() -> None:
    checks = doctor_cluster._gpus(
        [facts("a", gpus_ray=8.0, gpus_torch=0), facts("b", gpus_ray=4.0, gpus_torch=8)]
    )
    assert [(check.state, check.found) for check in checks] == [
        ("problem", "a: Ray offers 8, and torch sees 0"),
        ("missing", "b: torch sees 8, and Ray offers 4"),
    ]
    assert [
        check.state for check in doctor_cluster._gpus([facts("a", gpus_ray=8.0, gpus_torch=8)])
    ] == ["ok"]


def test_an_all_reduce_that_fails_and_one_that_finds_no_free_gpus() -> None:
    pair = [facts(host, gpus_ray=8.0, gpus_torch=8, nccl="2.28") for host in "ab"]
    (check,) = doctor_cluster._reduce(pair, lambda world, gpus: "Connection timed out", 16.0)
    assert (check.name, check.state, check.found) == (
        "NCCL", "problem", "all-reduce of 16 processes: Connection timed out",
    )  # fmt: skip
    (check,) = doctor_cluster._reduce(pair, lambda world, gpus: "", 16.0)
    assert (check.state, check.found) == ("ok", "2.28 all-reduce of 16 processes is correct")
    (check,) = doctor_cluster._reduce(pair, lambda world, gpus: 1 / 0, 13.0)
    assert (check.state, check.found) == ("note", "not tried: 3 of 16 GPUs are in use")


def test_the_token_line_follows_what_a_client_without_one_met() -> None:
    assert [refused(0, ""), refused(1, "AuthenticationError: …"), refused(1, "no route")] == [
        False,
        True,
        None,
    ]
    assert [doctor.token_check(asked).state for asked in (False, True, None)] == [
        "missing",
        "ok",
        "note",
    ]


def test_folders_of_a_recipe_that_every_machine_must_have_room_in() -> None:
    asked = ["mllm.train.cache_dir=/nvme/cache", "tokenizer.pixel.train.cache_dir=/nvme/cache"]
    asked += [
        "mllm.train.zero_stage=3",
        "mllm.train.offload=nvme",
        "mllm.train.offload_path=/nvme/states",
    ]
    assert doctor_cluster.local_folders(load_recipe("semhitok-256", asked)) == [
        "/nvme/cache",
        "/nvme/states",
    ]
