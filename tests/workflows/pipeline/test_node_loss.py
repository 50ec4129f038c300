"""The shard pipeline on two nodes, one of which is lost: its shards are done by the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from smalti.schema import Resources
from smalti.workflows.cluster.session import quiet_ray_data
from smalti.workflows.pipeline.shards import run_shards
from smalti.workflows.pipeline.timings import Tally

pytestmark = pytest.mark.ray


@pytest.fixture
def second_node(ray_node: dict[str, Any]) -> Iterator[Any]:
    """A head of one core with the driver, and a second node of one core; the head soon sees that a
    node is dead.
    """
    import ray
    from ray.cluster_utils import Cluster

    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "_system_config": health,
    }
    cluster = Cluster(initialize_head=True, head_node_args=ray_node | head)
    try:
        node = cluster.add_node(num_cpus=1, **ray_node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        quiet_ray_data()
        yield node
    finally:
        ray.shutdown()
        cluster.shutdown()


def worker_class() -> Any:
    """A worker that tells on which node it squares; made here, so that it travels by value."""

    class Square:
        def read(self, item: int) -> int:
            return item

        def work(self, item: int) -> tuple[int, str]:
            import time

            import ray

            time.sleep(0.05)
            return item * item, ray.get_runtime_context().get_node_id()

    return Square


def test_the_raylet_of_a_second_node_dies_and_the_run_goes_on(second_node: Any) -> None:
    found, nodes, killed, tally = [], [], False, Tally()
    for square, node in run_shards(
        list(range(40)), worker_class(), (), Resources(actors=2), tally=tally
    ):
        found.append(square)
        nodes.append(node)
        if not killed and node == second_node.node_id:
            second_node.all_processes["raylet"][0].process.kill()
            killed = True
    assert sorted(found) == [number * number for number in range(40)]
    assert killed and len(set(nodes)) == 2
    assert nodes[-1] != second_node.node_id
