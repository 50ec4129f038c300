"""Check that a cluster can place a recipe's stages.

Ray would wait forever for resources that no node has; this raises one error instead.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from smalti.errors import ConfigError
from smalti.progress import log
from smalti.schema import Recipe

Bundle = dict[str, float]
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
KUBERAY = "KUBERAY_GEN_RAY_START_CMD"  # set by its operator in every pod of a cluster
GROUPS = "SMALTI_WORKER_GROUPS"  # deploy/kuberay: {group: {max_workers, resources}} as JSON, in the head's pod
KIND = "ray.io/node-group"  # Ray's label of a node


@dataclass(frozen=True)
class Need:
    """`count` equal bundles of a stage, requested by `resources.<key>`.

    `gang`: all of them must be placed at once.
    """

    stages: str
    key: str
    count: int
    bundle: Bundle
    gang: bool


@dataclass(frozen=True)
class Node:
    """A kind of node: its resources in Ray, and how many exist or may be added."""

    name: str
    resources: Bundle
    count: int = 1


class Nodes(NamedTuple):
    """Nodes that are up, and kinds that may be added: at most `most` in total."""

    up: Sequence[Node]
    to_come: Sequence[Node] = ()
    most: float = math.inf

    def room(self, bundle: Bundle) -> int:
        """How many such bundles fit, adding the largest nodes first."""
        room = sum(room_for(bundle, node) * node.count for node in self.up)
        left = self.most
        for each, count in sorted(
            ((room_for(bundle, node), node.count) for node in self.to_come), reverse=True
        ):
            came = min(count, left)
            room += each * int(came)
            left -= came
        return room

    def __str__(self) -> str:
        """`4 x 96 CPU and 8 GPU, 1 x 0 CPU`: the nodes by what they offer."""
        counts: dict[str, int] = {}
        for node in [*self.up, *self.to_come]:
            text = bundle_text(
                {name: amount for name, amount in node.resources.items() if amount or name == "CPU"}
            )
            counts[text] = counts.get(text, 0) + node.count
        return (
            ", ".join(f"{count} x {text}" for text, count in counts.items()) or "there are no nodes"
        )


def needs_of(recipe: Recipe) -> list[Need]:
    """Bundles that the stages of a recipe place.

    Training workers are placed as one group, actors and tasks of pools individually.
    """
    resources = recipe.resources
    model = _bundle(resources.cpus_per_worker, resources.gpus_per_worker)
    measure = _bundle(resources.cpus_per_worker, min(1, resources.gpus_per_worker))
    data = "features, tokens" if recipe.clusters else "tokens"
    codebook = Need(
        "codebook", "actors", resources.actors, _bundle(1, resources.gpus_per_worker), gang=False
    )
    return [
        Need(f"corpus, {data}", "readers", resources.readers, _bundle(1, 0), gang=False),
        Need(data, "actors", resources.actors, model, gang=False),
        *([codebook] if recipe.clusters else []),
        Need("encoder, tokenizer, mllm", "workers", resources.min_workers, model, gang=True),
        Need("evaluate", "evaluation", 1, measure, gang=False),
    ]


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})


def cluster_nodes() -> Nodes:
    """Nodes of the connected cluster, and those that its autoscaler may add."""
    import ray

    return with_those_to_come([node for node in ray.nodes() if node["Alive"]])


def with_those_to_come(alive: Sequence[Mapping[str, Any]]) -> Nodes:
    """Nodes of `ray.nodes()`, and how many the autoscaler may add of each kind.

    A node's kind is the one that its label names, otherwise the first with the same resources.
    """
    kinds, most = _kinds()
    left = {kind.name: kind.count for kind in kinds}
    up = []
    for node in alive:
        offer = _offer(node["Resources"])
        up.append(Node(node["NodeManagerHostname"], offer))
        named = node.get("Labels", {}).get(KIND)
        same = [kind.name for kind in kinds if kind.resources == offer]
        for name in [named] if named in left else [] if named else same[:1]:
            left[name] -= 1
            most -= 1
    coming = [
        Node(kind.name, kind.resources, left[kind.name]) for kind in kinds if left[kind.name] > 0
    ]
    return Nodes(up, coming, max(0, most))


def _kinds() -> tuple[list[Node], float]:
    """Kinds of workers that the autoscaler may start, and how many in total.

    Read from deploy/kuberay's variable, or from the cluster file that `ray up` writes on the head,
    where jobs run; empty elsewhere.
    """
    path = Path(BOOTSTRAP).expanduser()
    if GROUPS in os.environ:
        kinds = json.loads(os.environ[GROUPS])
        most = math.inf
    elif path.is_file():
        config = yaml.safe_load(path.read_text())
        types = config["available_node_types"]
        head = config["head_node_type"]
        kinds = {name: kind for name, kind in types.items() if name != head}
        most = config.get("max_workers", 2)
    else:
        return [], math.inf
    return [
        Node(name, _offer(kind.get("resources", {})), kind.get("max_workers", most))
        for name, kind in kinds.items()
    ], most


def grows_unseen() -> bool:
    """Whether nodes may be added that are unknown here.

    KubeRay's autoscaler keeps its list in Kubernetes.
    """
    return KUBERAY in os.environ and GROUPS not in os.environ


def _offer(resources: Bundle) -> Bundle:
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}


def room_for(bundle: Bundle, node: Node) -> int:
    """How many such bundles a node of this kind holds."""
    return min(
        math.floor(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items()
    )


def unplaceable(recipe: Recipe, nodes: Nodes) -> list[str]:
    """A line per need that these nodes can never meet, with how to fix it."""
    found = []
    for need in needs_of(recipe):
        room = nodes.room(need.bundle)
        asked = bundle_text(need.bundle)
        if room == 0:
            found.append(
                f"{need.stages}: one of resources.{need.key} needs {asked}, and no node has that "
                f"({nodes}). Lower {_keys(need.bundle)}, or add such nodes."
            )
        elif need.gang and room < need.count:
            found.append(
                f"{need.stages}: resources.{need.key}={need.count} need {asked} each, all at once, "
                f"and the nodes have room for {room} ({nodes}). Set resources.{need.key}={room}, "
                "or add nodes."
            )
    return found


def shortages(recipe: Recipe, nodes: Nodes) -> list[str]:
    """A line per pool that can be placed only in part: it runs with fewer workers."""
    found = []
    for need in needs_of(recipe):
        room = nodes.room(need.bundle)
        if not need.gang and 0 < room < need.count:
            found.append(
                f"{need.stages}: room for {room} of resources.{need.key}={need.count} at once"
            )
    resources = recipe.resources
    group = next(need for need in needs_of(recipe) if need.gang)
    room = nodes.room(group.bundle)
    if resources.min_workers <= room < resources.max_workers:
        found.append(f"{group.stages}: room for {room} of up to {resources.max_workers} workers")
    cpus = nodes.room({"CPU": 1.0})
    wanted = resources.readers + resources.actors * resources.cpus_per_worker
    if resources.gpus_per_worker and cpus < wanted:
        found.append(
            f"features, tokens: readers and actors need {wanted} CPU at once, and there are "
            f"{cpus:g}; lower resources.readers"
        )
    return found


def check(recipe: Recipe) -> None:
    """Check that this cluster can place every stage of the recipe.

    If nodes may be added that are unknown here, only a line is logged.

    Raises:
        ConfigError: naming every stage that can never be placed.
    """
    found = unplaceable(recipe, cluster_nodes())
    if found and grows_unseen():
        log(
            "the nodes that are up have no room yet; waiting for KubeRay's autoscaler:\n  "
            + "\n  ".join(found)
        )
    elif found:
        raise ConfigError("This cluster would wait forever:\n  " + "\n  ".join(found))


def _keys(bundle: Bundle) -> str:
    return (
        "resources.cpus_per_worker or resources.gpus_per_worker"
        if "GPU" in bundle
        else "resources.cpus_per_worker"
    )


def bundle_text(bundle: Bundle) -> str:
    """`10 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
