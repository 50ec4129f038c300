"""What a cluster can place: by hand, and with the stages of the paper's recipe on simulated nodes
of logical GPUs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from smalti.config import load_recipe
from smalti.errors import ConfigError
from smalti.schema import Recipe
from smalti.workflows.cluster import placement
from smalti.workflows.cluster.placement import (
    Node,
    Nodes,
    needs_of,
    room_for,
    shortages,
    unplaceable,
)

ROOT = Path(__file__).resolve().parents[3]
NODE = Node("gpu", {"CPU": 96.0, "GPU": 8.0}, 4)
FOUR = Nodes([NODE])


def recipe(**resources: Any) -> Recipe:
    return load_recipe(
        "semhitok-256", [f"resources.{key}={value}" for key, value in resources.items()]
    )


def test_the_papers_recipe_has_room_on_four_nodes_of_eight() -> None:
    assert unplaceable(recipe(), FOUR) == []
    large, sixteen = load_recipe("unicode2-500k"), Nodes([replace(NODE, count=16)])
    assert unplaceable(large, sixteen) == [] == shortages(large, sixteen)
    assert room_for({"CPU": 10.0, "GPU": 1.0}, NODE) == 8
    assert room_for({"CPU": 0.5, "GPU": 0.5}, NODE) == 16
    assert {need.key for need in needs_of(recipe())} == {
        "readers",
        "actors",
        "workers",
        "evaluation",
    }


def test_a_worker_larger_than_any_node() -> None:
    found = unplaceable(recipe(cpus_per_worker=97), FOUR)
    assert len(found) == 3, "the model actors, the training workers and the evaluation"
    assert "needs 97 CPU and 1 GPU, and no node has that (4 x 96 CPU and 8 GPU)" in found[0]
    assert "Lower resources.cpus_per_worker or resources.gpus_per_worker" in found[0]


def test_more_workers_than_the_cluster_holds() -> None:
    (found,) = unplaceable(recipe(workers=33, cpus_per_worker=1), FOUR)
    assert (
        "resources.workers=33 need 1 CPU and 1 GPU each, all at once, and the nodes have room for 32"
        in found
    )
    assert found.endswith("Set resources.workers=32, or add nodes.")
    (found,) = unplaceable(recipe(workers=32, cpus_per_worker=13), FOUR)
    assert "room for 28" in found, "7 workers of 13 CPUs fit on a node of 96"


def test_pools_that_run_with_fewer_are_told_not_refused() -> None:
    small = Nodes([Node("gpu", {"CPU": 32.0, "GPU": 8.0}, 4)])
    assert unplaceable(recipe(workers=8, cpus_per_worker=4), small) == []
    found = shortages(recipe(workers=8, cpus_per_worker=4), small)
    assert "corpus, features, tokens: room for 128 of resources.readers=256 at once" in found
    assert any(
        "readers and actors need 384 CPU at once, and there are 128" in line for line in found
    )


def alive(cpus: float, gpus: float = 0.0, **labels: str) -> dict[str, Any]:
    """A node as `ray.nodes()` tells of it."""
    return {
        "NodeManagerHostname": "host",
        "Resources": {"CPU": cpus, "GPU": gpus},
        "Labels": labels,
    }


def test_nodes_that_ray_up_may_add_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the head of a cluster that starts without workers nothing is refused that its file has
    room for; those that are up leave so many fewer to come, and the file's `max_workers` bounds
    them all.
    """
    assert placement.with_those_to_come([]) == Nodes([], [])
    file = tmp_path / "config.yaml"
    file.write_text((ROOT / "ray_cluster.yaml").read_text())
    monkeypatch.setattr(placement, "BOOTSTRAP", str(file))
    nodes = placement.with_those_to_come([alive(0)])
    assert [(node.name, node.resources, node.count) for node in nodes.to_come] == [
        ("gpu_worker", {"CPU": 96.0, "GPU": 8.0}, 4),
        ("cpu_worker", {"CPU": 32.0, "GPU": 0.0}, 20),
    ]
    assert unplaceable(recipe(), nodes) == [] == shortages(recipe(), nodes)
    workers = [alive(96, 8), alive(96, 8), alive(30, **{placement.KIND: "cpu_worker"})]
    nodes = placement.with_those_to_come([alive(0), *workers])
    assert [(node.name, node.count) for node in nodes.to_come] == [
        ("gpu_worker", 2),
        ("cpu_worker", 19),
    ]
    assert nodes.most == 21
    assert nodes.room({"CPU": 10.0, "GPU": 1.0}) == 32
    (found,) = unplaceable(recipe(workers=33, cpus_per_worker=1), nodes)
    assert "room for 32 (1 x 0 CPU, 4 x 96 CPU and 8 GPU, 1 x 30 CPU, 19 x 32 CPU)" in found
    file.write_text(file.read_text().replace("max_workers: 24", "max_workers: 5"))
    nodes = placement.with_those_to_come([alive(0), *workers])
    assert nodes.room({"CPU": 32.0}) == 4 * 3, (
        "two nodes up, and two to come, of which the roomier count"
    )


def test_on_kuberay_the_groups_of_its_file_are_those_that_may_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With deploy/kuberay's variable what can never be met is refused, by a run and by doctor;
    without, both wait.
    """
    from smalti.cli.doctor_cluster import room_checks

    head = yaml.safe_load((ROOT / "deploy/kuberay/raycluster.yaml").read_text())["spec"][
        "headGroupSpec"
    ]
    (variable,) = head["template"]["spec"]["containers"][0]["env"]
    monkeypatch.setenv(placement.KUBERAY, "ray start …")
    assert placement.grows_unseen()
    checks = room_checks(
        recipe(), placement.with_those_to_come([alive(0)]), placement.grows_unseen()
    )
    assert {check.state for check in checks} == {"note"}
    monkeypatch.setenv(variable["name"], variable["value"])
    assert not placement.grows_unseen()
    nodes = placement.with_those_to_come([alive(0), alive(92, 8, **{placement.KIND: "gpu"})])
    assert [(node.name, node.count) for node in nodes.to_come] == [("gpu", 3), ("cpu", 20)]
    assert unplaceable(recipe(), nodes) == []
    check, *_ = room_checks(recipe(workers=33, cpus_per_worker=1), nodes, placement.grows_unseen())
    assert (check.state, check.fix) == ("problem", "Set resources.workers=32, or add nodes.")


@pytest.fixture(scope="module")
def simulated() -> Iterator[Any]:
    """bench/simulated_cluster.py, connected to a cluster of 2 nodes with 8 logical GPUs each."""
    spec = importlib.util.spec_from_file_location(
        "simulated_cluster", ROOT / "bench" / "simulated_cluster.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulated_cluster"] = module
    spec.loader.exec_module(module)
    import ray

    ray.shutdown()
    cluster = module.start(nodes=2, gpus=8, cpus=96)
    yield module
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
def test_every_stage_of_the_papers_recipe_is_scheduled(simulated: Any) -> None:
    rows = simulated.schedule(recipe(workers=16, actors=16, readers=32), 0)
    assert [name for name, _, _ in rows] == [
        "data stages",
        "codebook",
        "encoder, tokenizer, mllm",
        "evaluate",
    ]


@pytest.mark.ray
def test_what_would_wait_for_ever_is_refused_before(simulated: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"This cluster would wait forever:\n  encoder, tokenizer, mllm: .*=17"
    ):
        simulated.schedule(recipe(workers=17, cpus_per_worker=1), 0)


@pytest.mark.ray
def test_the_nodes_of_a_recipe_are_waited_for_only_so_long(simulated: Any) -> None:
    from smalti.workflows.cluster.checks import wait_for_room

    assert wait_for_room(recipe(workers=16, actors=16, readers=9), 60)[1]
    waited_s, came = wait_for_room(recipe(workers=17, actors=1, cpus_per_worker=1), 0.5)
    assert not came and 0.5 <= waited_s < 30


@pytest.mark.ray
def test_doctor_looks_at_every_node(
    simulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of one machine share its folders and versions; their GPUs are not there, and torch says
    so.
    """
    from smalti.cli.doctor_cluster import cluster_checks

    checks = {
        check.name: check
        for check in cluster_checks(str(tmp_path / "out"), recipe(workers=40, actors=16, readers=9))
    }
    assert checks["nodes"].found.startswith("3 answered")
    assert checks["versions"].state == "ok"
    assert "every node writes there" in checks["storage"].found
    assert not any((tmp_path / "out").glob(".smalti-doctor*"))
    assert (
        checks["GPUs"].state == "problem"
        and "Ray offers 8, and torch sees 0" in checks["GPUs"].found
    )
    assert checks["room"].state == "problem" and checks["room"].fix.startswith(
        "Set resources.workers=16"
    )
