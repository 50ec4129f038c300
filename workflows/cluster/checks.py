"""Checks of a cluster's nodes: versions, GPUs, disk and the output folder.

A task runs on each node. A second check is an all-reduce over all GPUs (or a few CPU processes), as
training does it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smalti import storage
from smalti.errors import SmaltiError
from smalti.workflows.cluster.placement import Nodes, cluster_nodes, needs_of

if TYPE_CHECKING:
    from smalti.schema import Recipe

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "pyarrow", "numpy")
MARKS = ".smalti-doctor"
TIMEOUT_S = 120
DRIVER = "/dev/nvidiactl"  # if it exists, torch may see GPUs that Ray does not know


@dataclass(frozen=True)
class NodeFacts:
    """Facts that a task collected on its node.

    `free_bytes`: per folder that a run writes to. `wrote`: empty, or why the output folder could
    not be written to.
    """

    node: str
    host: str
    python: str
    packages: dict[str, str]
    gpus_ray: float
    gpus_torch: int
    nccl: str
    free_bytes: dict[str, int]
    wrote: str


def node_facts(node: str, gpus_ray: float, marks: str, folders: Sequence[str]) -> NodeFacts:
    """Facts of this node; also writes a mark named after it into `marks`."""
    try:
        storage.write_atomic(storage.join(marks, node), socket.gethostname().encode())
        wrote = ""
    except (SmaltiError, OSError) as error:
        wrote = str(error).splitlines()[0]
    gpus_torch, nccl = _cuda() if gpus_ray or os.path.exists(DRIVER) else (0, "")
    local = [
        *(folder for folder in folders if storage.is_local(folder)),
        tempfile.gettempdir(),
        spill_folder(),
    ]
    return NodeFacts(
        node=node,
        host=socket.gethostname(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        gpus_ray=gpus_ray,
        gpus_torch=gpus_torch,
        nccl=nccl,
        free_bytes={folder: _free(folder) for folder in local},
        wrote=wrote,
    )


def spill_folder() -> str:
    """The folder into which Ray spills objects on this node.

    Read from the command line of the raylet that started this process; otherwise Ray's default.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        words = []
    return next(
        (word.partition("=")[2] for word in words if word.startswith("--fallback_directory=")),
        "/tmp/ray",
    )


def _cuda() -> tuple[int, str]:
    """(number of GPUs that torch sees, version of NCCL)."""
    import torch

    if not torch.cuda.is_available():
        return 0, ""
    return torch.cuda.device_count(), ".".join(map(str, torch.cuda.nccl.version()))


def marks_seen(marks: str) -> list[str]:
    """The marks that this node sees."""
    return storage.list_names(marks)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _free(folder: str) -> int:
    path = os.path.abspath(storage.local_path(folder))
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def survey(
    out: str, folders: Sequence[str] = ()
) -> tuple[list[NodeFacts], dict[str, list[str]], list[str]]:
    """Check every node of the connected cluster; the marks are removed afterwards.

    Args:
        out: the output folder.
        folders: other folders that a run writes to on every node.

    Returns:
        The facts of every node that answered; by node, the marks of other nodes that it does not
        see; and the nodes that
        did not answer.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    marks = storage.join(out, f"{MARKS}-{uuid.uuid4().hex[:8]}")
    marks = marks if not storage.is_local(marks) else os.path.abspath(storage.local_path(marks))
    gpus = {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in nodes}
    facts = _on_each(gpus, node_facts, lambda node: (node, gpus[node], marks, (out, *folders)))
    answered = {fact.node for fact in facts.values()}
    wrote = {fact.node for fact in facts.values() if not fact.wrote}
    try:
        seen = _on_each(answered, marks_seen, lambda node: (marks,))
        unseen = {node: sorted(wrote - set(names)) for node, names in seen.items()}
    finally:
        _on_each(answered, _forget, lambda node: (marks,))
    return (
        list(facts.values()),
        {node: lost for node, lost in unseen.items() if lost},
        sorted(set(gpus) - answered),
    )


def wait_for_room(recipe: Recipe, most_s: float) -> tuple[float, bool]:
    """Request the recipe's nodes from the autoscaler and wait until they are up.

    The request is withdrawn afterwards: nodes without work are removed after their idle time.

    Returns:
        The seconds waited, and whether the nodes came up.
    """
    from ray.autoscaler.sdk import request_resources

    largest = [need for need in needs_of(recipe) if need.gang or need.key == "actors"]
    bundles = max(([dict(need.bundle)] * need.count for need in largest), key=len)
    started = time.monotonic()
    request_resources(bundles=bundles)
    try:
        while True:
            up = Nodes(cluster_nodes().up)
            came = all(up.room(need.bundle) >= need.count for need in largest)
            waited_s = time.monotonic() - started
            if came or waited_s >= most_s:
                return waited_s, came
            time.sleep(min(5.0, most_s - waited_s))
    finally:
        request_resources(bundles=[])


def asks_for_token(address: str) -> bool | None:
    """Whether a cluster refuses clients without a token; None if unknown."""
    hidden = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    code = f"import ray; ray.init({address!r}, logging_level='ERROR', log_to_driver=False)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return refused(done.returncode, done.stderr)


def refused(returncode: int, errors: str) -> bool | None:
    """Whether a client without a token was refused; None if it failed otherwise."""
    if returncode == 0:
        return False
    return True if "auth" in errors.lower() else None


def _forget(marks: str) -> None:
    storage.remove(marks)


Result = TypeVar("Result")


def _on_each(
    nodes: Iterable[str],
    function: Callable[..., Result],
    arguments: Callable[[str], tuple[object, ...]],
) -> dict[str, Result]:
    """Run `function(*arguments(node))` on each node; nodes that time out are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0)(function)
    running = {
        node: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), max_retries=0
        ).remote(*arguments(node))
        for node in nodes
    }
    found = {}
    ray.wait(list(running.values()), num_returns=len(running), timeout=TIMEOUT_S)
    for node, reference in running.items():
        try:
            found[node] = ray.get(reference, timeout=0.1)
        except (ray.exceptions.RayError, TimeoutError):
            continue
    return found


class Ring:
    """One process of an all-reduce."""

    def address(self) -> str:
        """An address of this process for the others."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return f"tcp://{ray.util.get_node_ip_address()}:{port}"

    def reduce(self, address: str, rank: int, world: int, backend: str) -> float:
        """Sum of all ranks (0 + 1 + …) through this backend."""
        import datetime

        import torch
        import torch.distributed as dist

        limit = datetime.timedelta(seconds=TIMEOUT_S)
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=world, timeout=limit
        )
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        total = torch.full((1024,), float(rank), device=device)
        dist.all_reduce(total)
        answer = float(total.mean())
        dist.destroy_process_group()
        return answer


def all_reduce(world: int, gpus: float) -> str:
    """Test an all-reduce of `world` processes.

    Each has a GPU (NCCL) with `gpus`; otherwise they use gloo.

    Returns:
        Empty if the sum is right, otherwise the error.
    """
    import ray

    backend = "nccl" if gpus else "gloo"
    kind: Any = ray.remote(num_cpus=0, num_gpus=gpus)(Ring)
    actors = [kind.remote() for _ in range(world)]
    try:
        address = ray.get(actors[0].address.remote(), timeout=TIMEOUT_S)
        sums = [
            actor.reduce.remote(address, rank, world, backend) for rank, actor in enumerate(actors)
        ]
        found = set(ray.get(sums, timeout=TIMEOUT_S))
    except Exception as error:  # of torch, of Ray, or a time-out: each is an answer
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    finally:
        for actor in actors:
            ray.kill(actor)
    wanted = world * (world - 1) / 2
    return (
        ""
        if found == {wanted}
        else f"{world} processes added up to {sorted(found)}, expected {wanted:g}"
    )
