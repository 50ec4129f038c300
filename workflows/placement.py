"""Whether a cluster can ever place what a recipe's stages ask of Ray: said in one error, where Ray would wait for ever."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from smalti.errors import ConfigError
from smalti.progress import log
from smalti.schema import Recipe

Bundle = dict[str, float]
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
KUBERAY = "KUBERAY_GEN_RAY_START_CMD"  # set by its operator in every pod of a cluster


@dataclass(frozen=True)
class Need:
    """`count` equal bundles of a stage, asked for by the key `key`. `gang`: all of them at once, or none starts."""

    stages: str
    key: str
    count: int
    bundle: Bundle
    gang: bool


@dataclass(frozen=True)
class Node:
    """A kind of node: what it offers to Ray, and how many of it there are, or could be."""

    name: str
    resources: Bundle
    count: int = 1


def needs_of(recipe: Recipe) -> list[Need]:
    """What the stages of a recipe place: training workers as one group, pools of actors and tasks one by one."""
    resources = recipe.resources
    model = _bundle(resources.cpus_per_worker, resources.gpus_per_worker)
    measure = _bundle(resources.cpus_per_worker, min(1, resources.gpus_per_worker))
    return [
        Need("corpus, features, tokens", "readers", resources.readers, _bundle(1, 0), gang=False),
        Need("features, tokens", "actors", resources.actors, model, gang=False),
        Need("codebook", "actors", resources.actors, _bundle(1, resources.gpus_per_worker), gang=False),
        Need("encoder, tokenizer, mllm", "workers", resources.min_workers, model, gang=True),
        Need("evaluate", "evaluation", 1, measure, gang=False),
    ]


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})


def cluster_nodes() -> list[Node]:
    """Nodes of the cluster that this process is connected to, and those that `ray up`'s autoscaler may add."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(node["NodeManagerHostname"], _offer(node["Resources"])) for node in alive] + _to_come()


def _to_come() -> list[Node]:
    """Kinds of nodes in the cluster file that `ray up` leaves on the head, where jobs run; none elsewhere."""
    path = Path(BOOTSTRAP).expanduser()
    if not path.is_file():
        return []
    config = yaml.safe_load(path.read_text())
    kinds = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    most = config.get("max_workers", 2)  # Ray's default
    return [
        Node(name, _offer(kind.get("resources", {})), min(most, kind.get("max_workers", most)))
        for name, kind in kinds.items()
    ]


def grows_unseen() -> bool:
    """Whether nodes may come that cannot be known here: KubeRay's autoscaler has its list in Kubernetes."""
    return KUBERAY in os.environ


def _offer(resources: Bundle) -> Bundle:
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}


def room_for(bundle: Bundle, node: Node) -> int:
    """How many such bundles a node of this kind holds."""
    return min(math.floor(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items())


def unplaceable(recipe: Recipe, nodes: Sequence[Node]) -> list[str]:
    """A line for each need that could never be met on these nodes, with its mend; none when all can."""
    found = []
    for need in needs_of(recipe):
        room = sum(room_for(need.bundle, node) * node.count for node in nodes)
        asked = bundle_text(need.bundle)
        if room == 0:
            found.append(
                f"{need.stages}: one of resources.{need.key} takes {asked}, and no node has that "
                f"({_kinds(nodes)}). Lower {_keys(need.bundle)}, or add such nodes."
            )
        elif need.gang and room < need.count:
            found.append(
                f"{need.stages}: resources.{need.key}={need.count} take {asked} each, all at once, and the nodes have "
                f"room for {room} ({_kinds(nodes)}). Set resources.{need.key}={room}, or add nodes."
            )
    return found


def shortages(recipe: Recipe, nodes: Sequence[Node]) -> list[str]:
    """A line for each pool that has room for a part of itself only: it runs, with fewer."""
    found = []
    for need in needs_of(recipe):
        room = sum(room_for(need.bundle, node) * node.count for node in nodes)
        if not need.gang and 0 < room < need.count:
            found.append(f"{need.stages}: room for {room} of resources.{need.key}={need.count} at once")
    resources = recipe.resources
    group = next(need for need in needs_of(recipe) if need.gang)
    room = sum(room_for(group.bundle, node) * node.count for node in nodes)
    if resources.min_workers <= room < resources.max_workers:
        found.append(f"{group.stages}: room for {room} of up to {resources.max_workers} workers")
    cpus = sum(node.resources.get("CPU", 0.0) * node.count for node in nodes)
    wanted = resources.readers + resources.actors * resources.cpus_per_worker
    if resources.gpus_per_worker and cpus < wanted:
        found.append(
            f"features, tokens: readers and actors take {wanted} CPU at once, and there are {cpus:g}; lower resources.readers"
        )
    return found


def check(recipe: Recipe) -> None:
    """ConfigError naming every stage of the recipe that this cluster could never place. Where nodes may come that are not
    known here, a line is logged instead."""
    found = unplaceable(recipe, cluster_nodes())
    if found and grows_unseen():
        log("the nodes that are up have no room yet; waiting for KubeRay's autoscaler:\n  " + "\n  ".join(found))
    elif found:
        raise ConfigError("This cluster would wait for ever:\n  " + "\n  ".join(found))


def _keys(bundle: Bundle) -> str:
    return "resources.cpus_per_worker or resources.gpus_per_worker" if "GPU" in bundle else "resources.cpus_per_worker"


def bundle_text(bundle: Bundle) -> str:
    """`10 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def _kinds(nodes: Sequence[Node]) -> str:
    """`4 x 96 CPU and 8 GPU, 1 x 0 CPU`: the nodes by what they offer."""
    counts: dict[str, int] = {}
    for node in nodes:
        text = bundle_text({name: amount for name, amount in node.resources.items() if amount or name == "CPU"})
        counts[text] = counts.get(text, 0) + node.count
    return ", ".join(f"{count} x {text}" for text, count in counts.items()) or "there are no nodes"
