"""A simulated cluster of logical GPUs: everything that the stages of a recipe place becomes ready,
or is refused before.

    python bench/simulated_cluster.py [RECIPE] [--nodes 16 --gpus 8 --cpus 96]

It starts that many Ray nodes on this machine (none has a real GPU), asks the check that runs before
the stages, and then reserves what each stage places: the training workers as one group, as Ray
Train asks for them; readers and model actors of the data stages at once; the evaluation's actor. A
reservation starts no process, so that 288 actors fit on a small machine; `--pool N` also runs Ray
Data's pools with N real readers and N real actors. Prints one table, and as its last line JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.machine import machine
from smalti.config import load_recipe
from smalti.errors import ConfigError
from smalti.schema import Recipe

if TYPE_CHECKING:
    from smalti.workflows.cluster.placement import Need

STORE_BYTES, LIMIT_S = 80 * 2**20, 300


class Sleeper:
    """A stage's worker without its work: an item in, the node out."""

    def read(self, item: Any) -> Any:
        return item

    def work(self, loaded: Any) -> str:
        import ray

        time.sleep(0.05)
        return ray.get_runtime_context().get_actor_id()


def start(nodes: int, gpus: int, cpus: int) -> Any:
    """A cluster of so many nodes beside a head that offers nothing; this process is connected to
    it.
    """
    import ray
    from ray.cluster_utils import Cluster

    from smalti.workflows.cluster.session import quiet_ray_data

    head = {
        "num_cpus": 0,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "dashboard_agent_listen_port": 0,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    quiet_ray_data()
    return cluster


def reserve(needs: Sequence[Need]) -> float:
    """Seconds until all bundles of these needs are reserved at once; they are given back.

    Errors: Ray's time-out.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    started = time.monotonic()
    group = placement_group(
        [dict(need.bundle) for need in needs for _ in range(need.count)], strategy="PACK"
    )
    try:
        ray.get(group.ready(), timeout=LIMIT_S)
        return time.monotonic() - started
    finally:
        remove_placement_group(group)


def pool(recipe: Recipe, size: int) -> tuple[float, int]:
    """(seconds, different actors) of items through the pools of a data stage, `size` readers and
    actors.
    """
    import ray

    from smalti.workflows.pipeline.shards import run_shards

    ray.cloudpickle.register_pickle_by_value(sys.modules[Sleeper.__module__])
    resources = recipe.resources.model_copy(update={"readers": size, "actors": size})
    started = time.monotonic()
    actors = set(run_shards(list(range(16 * size)), Sleeper, (), resources))
    return time.monotonic() - started, len(actors)


def schedule(recipe: Recipe, size: int) -> list[tuple[str, float, str]]:
    """(stages, seconds, what) of everything that the recipe places.

    ConfigError: what could never be placed.
    """
    from smalti.workflows.cluster import placement
    from smalti.workflows.cluster.checks import all_reduce

    placement.check(recipe)
    needs = placement.needs_of(recipe)
    data = [
        need for need in needs if need.key in ("readers", "actors") and need.stages != "codebook"
    ]
    rows = [
        (
            "data stages",
            reserve(data),
            f"{sum(need.count for need in data)} readers and actors at once",
        )
    ]
    for need in needs:
        if need not in data:
            rows.append(
                (
                    need.stages,
                    reserve([need]),
                    f"{need.count} x {placement.bundle_text(need.bundle)}",
                )
            )
    if size:
        took, actors = pool(recipe, size)
        rows.append(("pools of Ray Data", took, f"{actors} real actors took part"))
        started = time.monotonic()
        wrong = all_reduce(2, 0.0)
        rows.append(
            (
                "doctor's all-reduce",
                time.monotonic() - started,
                wrong or "2 processes through gloo add up right",
            )
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="semhitok-256")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=96)
    parser.add_argument("--pool", type=int, default=4)
    asked = parser.parse_args()
    import psutil
    import ray

    recipe = load_recipe(asked.recipe, [*asked.overrides, f"out={tempfile.gettempdir()}/simulated"])
    before = psutil.virtual_memory().available
    started = time.monotonic()
    cluster = start(asked.nodes, asked.gpus, asked.cpus)
    rows = [
        (
            "nodes up",
            time.monotonic() - started,
            f"{asked.nodes} x {asked.cpus} CPUs and {asked.gpus} GPUs",
        )
    ]
    used = (before - psutil.virtual_memory().available) / 1e9
    refused = ""
    try:
        rows += schedule(recipe, asked.pool)
    except ConfigError as error:
        refused = str(error)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(f"{recipe.name} on a simulated cluster; its nodes took {used:.1f} GB")
    for name, took, what in rows:
        print(f"  {name:<26} {took:>8.1f} s  {what}")
    if refused:
        print(refused)
    result = {
        "goal": "simulated_cluster",
        "machine": machine(),
        "nodes": asked.nodes,
        "gpus": asked.gpus * asked.nodes,
    }
    print(
        json.dumps(
            result
            | {"met": not refused, "seconds": {name: round(took, 1) for name, took, _ in rows}}
        )
    )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
