"""Training on two nodes of which one goes, with notice or without: gone on with fewer workers, and
the same curve.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from smalti.tracking import NullTracker

TOY = Path(__file__).with_name("toy_training.py")
# Ray may hand a notice on late: 48 s while steps are slow
LONG = {
    "steps": 96,
    "checkpoint_every": 999,
}
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy_training", TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_training"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["toy_training"]


@pytest.fixture
def other(ray_node):
    """The second of two nodes of one CPU, which a test takes away.

    Each test has a cluster of its own, with both nodes from the start: after the first training Ray
    looks for new ones every 20 s alone.
    """
    import ray
    from ray.cluster_utils import Cluster

    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 6,
    }
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=ray_node | head)
    try:
        node = cluster.add_node(num_cpus=1, **ray_node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        yield node
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """`whole()`: what one worker makes without a break; a test calls it when its own training is
    done.
    """
    path = tmp_path_factory.mktemp("whole")

    def made() -> Path:
        if not (path / "final.pt").exists():
            toy.train(str(path), zero_stage=3, **LONG)
        return path

    return made


def assert_same(path: Path, whole: Path) -> None:
    ours, theirs = (torch.load(place / "final.pt", weights_only=True) for place in (path, whole))
    for engine, state in theirs.items():
        torch.testing.assert_close(ours[engine], state, rtol=0, atol=1e-5)
    curves = [
        [json.loads(line) for line in (p / "history.jsonl").read_text().splitlines()]
        for p in (path, whole)
    ]
    for mine, other_row in zip(*curves, strict=True):
        assert mine == pytest.approx(other_row, abs=1e-4)


def meanwhile(work) -> tuple[threading.Thread, list[BaseException]]:
    """`work()` in a thread, and the errors it met."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, failed


class Steps(NullTracker):
    """Keeps what was logged at which step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def metrics(self, values, step=None) -> None:
        self.seen[step] = dict(values)


def give_notice(node_id: str, seconds: float) -> None:
    """What a cloud's agent tells Ray when a spot machine is about to go."""
    import ray
    from ray.core.generated import autoscaler_pb2

    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, told = client.drain_node(node_id, reason, "test", int((time.time() + seconds) * 1000))
    assert accepted, told


def test_a_node_that_goes_with_notice_costs_no_step(other, whole, toy, tmp_path) -> None:
    """ZeRO-3 on [1, 2] workers, no other checkpoint than the one made at the notice; one worker
    ends what two began.
    """
    run = toy.FakeRun(str(tmp_path / "run"), (1, 2))
    run.tracker = Steps()
    slowly = tmp_path / "slowly"
    slowly.touch()

    def take_away() -> None:
        while not run.tracker.seen:
            time.sleep(0.1)
        give_notice(other.node_id, 60)
        while not any("saved at step" in line for line in run.lines):
            time.sleep(0.1)
        slowly.unlink()
        other.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)

    thread, failed = meanwhile(take_away)
    toy.train(
        run.path, run=run, zero_stage=3, **LONG, settings={"slow_s": 0.5, "flag": str(slowly)}
    )
    thread.join(5)
    assert not failed and not thread.is_alive()
    ready = [line for line in run.lines if "worker(s) ready after" in line]
    (saved,) = [line for line in run.lines if "saved at step" in line]
    step = int(saved.rsplit(" ", 1)[1])
    assert ready[0].startswith("2 worker(s)") and len(ready) == 2
    assert ready[1].startswith("1 worker(s)") and ready[1].endswith(f"resuming after step {step}")
    assert_same(Path(run.path), whole())


def test_a_node_that_dies_without_notice_is_done_without(other, whole, toy, tmp_path) -> None:
    """The raylet is killed after a checkpoint: one worker resumes there, and each sample comes
    once.
    """
    run = toy.FakeRun(str(tmp_path / "run"), (1, 2))
    slowly, record = tmp_path / "slowly", str(tmp_path / "record")
    slowly.touch()
    saved = Path(run.path) / "checkpoints" / "step-000000008"

    def kill() -> None:
        while len(list(saved.glob("manifest-*"))) < 2:
            time.sleep(0.1)
        other.all_processes["raylet"][0].process.kill()
        while not any("restarting the workers" in line for line in run.lines):
            time.sleep(0.1)
        slowly.unlink()

    thread, failed = meanwhile(kill)
    settings = {"slow_s": 0.5, "flag": str(slowly), "record": record}
    toy.train(run.path, run=run, zero_stage=3, **LONG | {"checkpoint_every": 8}, settings=settings)
    thread.join(5)
    assert not failed and not thread.is_alive()
    ready = [line for line in run.lines if "worker(s) ready after" in line]
    assert ready[0].startswith("2 worker(s)") and len(ready) == 2
    assert ready[1].startswith("1 worker(s)") and "resuming after step " in ready[1]
    assert any(
        line.startswith("worker(s) ") and "restarting the workers" in line for line in run.lines
    )
    toy.check_record(record, LONG["steps"], 8)
    assert_same(Path(run.path), whole())
