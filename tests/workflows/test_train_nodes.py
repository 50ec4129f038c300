"""Training on two nodes of which one is taken away with notice: saved in time, gone on with fewer workers."""

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
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy_training", TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_training"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["toy_training"]


@pytest.fixture
def nodes():
    """(cluster, the node that can go): two nodes of one CPU."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        yield cluster, other
    finally:
        ray.shutdown()
        cluster.shutdown()


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


def test_a_node_that_goes_with_notice_costs_no_step(nodes, toy, tmp_path) -> None:
    """ZeRO-3 on [1, 2] workers, no other checkpoint than the one made at the notice; one worker ends what two began."""
    cluster, other = nodes
    run = toy.FakeRun(str(tmp_path / "run"), (1, 2))
    run.tracker = Steps()
    failed: list[BaseException] = []
    slowly = tmp_path / "slowly"
    slowly.touch()
    long = {"steps": 96, "checkpoint_every": 999}  # Ray may hand a notice on late: 48 s while steps are slow

    def take_away() -> None:
        try:
            while not run.tracker.seen:
                time.sleep(0.1)
            give_notice(other.node_id, 60)
            while not any("saved at step" in line for line in run.lines):
                time.sleep(0.1)
            slowly.unlink()
            cluster.remove_node(other, allow_graceful=False)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    toy.train(run.path, run=run, zero_stage=3, **long, settings={"slow_s": 0.5, "flag": str(slowly)})
    thread.join(5)
    assert not failed and not thread.is_alive()
    ready = [line for line in run.lines if "ready after" in line]
    (saved,) = [line for line in run.lines if "saved at step" in line]
    step = int(saved.rsplit(" ", 1)[1])
    assert ready[0].startswith("2 worker(s)") and len(ready) == 2
    assert ready[1].startswith("1 worker(s)") and ready[1].endswith(f"going on after step {step}")
    whole = tmp_path / "whole"
    toy.train(str(whole), zero_stage=3, **long)
    ours, theirs = (torch.load(path / "final.pt", weights_only=True) for path in (Path(run.path), whole))
    for engine, state in theirs.items():
        torch.testing.assert_close(ours[engine], state, rtol=0, atol=1e-5)
    curves = [
        [json.loads(line) for line in (Path(p) / "history.jsonl").read_text().splitlines()] for p in (run.path, whole)
    ]
    for mine, other_row in zip(*curves, strict=True):
        assert mine == pytest.approx(other_row, abs=1e-4)
