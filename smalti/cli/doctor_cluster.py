"""What `smalti doctor` finds on every node of a cluster, and whether a recipe's stages have room
there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smalti.cli.check import MIN_DISK_BYTES, Check, gib

if TYPE_CHECKING:
    from smalti.schema import Recipe

# `facts` are the `NodeFacts` of `smalti.workflows.cluster.checks`.
MUST_AGREE = ("python", "ray", "torch", "deepspeed", "transformers")


def cluster_checks(out: str, recipe: Recipe | None, wait_s: float = 0.0) -> list[Check]:
    """Lines about all nodes.

    Ray must be connected. wait_s: how long the nodes of a recipe are waited for first.
    """
    import ray

    from smalti.workflows.cluster import checks as work
    from smalti.workflows.cluster.placement import cluster_nodes, grows_unseen

    checks = (
        [] if recipe is None or not wait_s else [came_check(*work.wait_for_room(recipe, wait_s))]
    )
    facts, unseen, silent = work.survey(out, [] if recipe is None else local_folders(recipe))
    hosts = {fact.node: fact.host for fact in facts}
    checks += [_answers(facts, silent), *_versions(facts), *_gpus(facts), *_disk(facts)]
    checks += _storage(
        out, facts, {hosts[node]: [hosts[name] for name in lost] for node, lost in unseen.items()}
    )
    checks += _reduce(facts, work.all_reduce, ray.available_resources().get("GPU", 0.0))
    return checks + ([] if recipe is None else room_checks(recipe, cluster_nodes(), grows_unseen()))


def came_check(waited_s: float, came: bool) -> Check:
    if came:
        return Check("autoscaler", "ok", f"the nodes of the recipe are up after {waited_s:.0f} s")
    fix = "the checks below are of the nodes that are up; `ray status` shows pending nodes; or wait longer"
    return Check(
        "autoscaler", "note", f"the nodes of the recipe are not up after {waited_s:.0f} s", fix
    )


def local_folders(recipe: Recipe) -> list[str]:
    """Folders on each machine that the recipe's trainings write to: caches of shards, and states
    that are offloaded.
    """
    tokenizer = recipe.tokenizer
    encoder = recipe.encoder.train
    trains = [
        recipe.mllm.train,
        tokenizer.semantic.train,
        tokenizer.pixel.train,
        tokenizer.dual.train,
    ]
    trains += [part.train for part in (tokenizer.decoder, encoder) if part]
    found = [path for train in trains for path in (train.cache_dir, train.offload_path) if path]
    return list(dict.fromkeys(found))


def _answers(facts: list[Any], silent: list[str]) -> Check:
    if silent:
        fix = "read its raylet log (/tmp/ray/session_latest/logs), and that the packages are installed there"
        return Check("nodes", "problem", f"{len(silent)} did not answer: {', '.join(silent)}", fix)
    return Check(
        "nodes", "ok", f"{len(facts)} answered: {', '.join(sorted({fact.host for fact in facts}))}"
    )


def _versions(facts: list[Any]) -> list[Check]:
    """Packages that differ between nodes: pickles and checkpoints go from one to the other."""
    checks = []
    for name in MUST_AGREE:
        found: dict[str, list[str]] = {}
        for fact in facts:
            found.setdefault(fact.python if name == "python" else fact.packages[name], []).append(
                fact.host
            )
        if len(found) > 1:
            text = "; ".join(
                f"{version} on {', '.join(sorted(set(hosts)))}" for version, hosts in found.items()
            )
            fix = "install requirements.lock on every node (setup_commands of ray_cluster.yaml), and start them again"
            checks.append(Check(f"{name} on nodes", "problem", text, fix))
    if not checks and facts:
        first = facts[0]
        text = ", ".join(f"{name} {version}" for name, version in first.packages.items())
        checks.append(
            Check("versions", "ok", f"the same on all nodes: python {first.python}, {text}")
        )
    return checks


def _gpus(facts: list[Any]) -> list[Check]:
    wrong = [fact for fact in facts if fact.gpus_ray > fact.gpus_torch]
    checks = [
        Check(
            "GPUs",
            "problem",
            f"{fact.host}: Ray offers {fact.gpus_ray:g}, and torch sees {fact.gpus_torch}",
            "install the NVIDIA driver and a CUDA build of torch there, or start its Ray with --num-gpus of what it has",
        )
        for fact in wrong
    ]
    checks += [
        Check(
            "GPUs",
            "missing",
            f"{fact.host}: torch sees {fact.gpus_torch}, and Ray offers {fact.gpus_ray:g}",
            "start its Ray with --num-gpus of what it has, unless the others are kept for something else",
        )
        for fact in facts
        if fact.gpus_torch > fact.gpus_ray
    ]
    total = sum(fact.gpus_ray for fact in facts)
    if total and not checks:
        checks.append(Check("GPUs", "ok", f"{total:g}, as many as torch sees"))
    return checks


def _disk(facts: list[Any]) -> list[Check]:
    low = {
        f"{fact.host}:{folder}": free
        for fact in facts
        for folder, free in fact.free_bytes.items()
        if free < MIN_DISK_BYTES
    }
    if low:
        text = ", ".join(f"{where} has {gib(free)}" for where, free in low.items())
        fix = "free some space; Ray spills to another disk with ray start --object-spilling-directory, TMPDIR moves the rest"
        return [Check("disk on nodes", "missing", text, fix)]
    least = min((free for fact in facts for free in fact.free_bytes.values()), default=0)
    return [Check("disk on nodes", "ok", f"at least {gib(least)} free on each")] if least else []


def _storage(out: str, facts: list[Any], unseen: dict[str, list[str]]) -> list[Check]:
    failed = {fact.host: fact.wrote for fact in facts if fact.wrote}
    if failed:
        text = "; ".join(f"{host}: {why}" for host, why in failed.items())
        return [
            Check(
                "storage",
                "problem",
                text,
                "fix the permissions or credentials there, or set another out",
            )
        ]
    if unseen:
        text = "; ".join(
            f"{host} does not see what {', '.join(lost)} wrote" for host, lost in unseen.items()
        )
        fix = f"{out} is another folder there: set out to a URL (s3://…), or mount one shared folder on all nodes"
        return [Check("storage", "problem", text, fix)]
    return [
        Check("storage", "ok", f"{out}: every node writes there, and sees what the others wrote")
    ]


def _reduce(facts: list[Any], all_reduce: Any, free_gpus: float) -> list[Check]:
    """NCCL over all GPUs; without GPUs gloo over a process a node, where there are several.

    Not tried while others work.
    """
    gpus = int(sum(fact.gpus_ray for fact in facts))
    if gpus and any(fact.gpus_ray > fact.gpus_torch for fact in facts):
        return []
    world = gpus or len(facts)
    if world < 2 and not gpus:
        return []
    if free_gpus < gpus:
        text = f"not tried: {gpus - free_gpus:g} of {gpus} GPUs are in use"
        return [Check("NCCL", "note", text, "run doctor while nothing else runs there")]
    name = "NCCL" if gpus else "gloo"
    versions = ", ".join(sorted({fact.nccl for fact in facts if fact.nccl}))
    wrong = all_reduce(world, 1.0 if gpus else 0.0)
    if wrong:
        fix = "open all ports between the nodes; set NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME) to their common network"
        return [Check(name, "problem", f"all-reduce of {world} processes: {wrong}", fix)]
    return [Check(name, "ok", f"{versions} all-reduce of {world} processes is correct".strip())]


def room_checks(recipe: Recipe, nodes: Any, unseen: bool = False) -> list[Check]:
    """Whether the recipe's stages can be placed on these nodes. unseen: others may come, of which
    nothing is known here.
    """
    from smalti.workflows.cluster.placement import shortages, unplaceable

    checks = []
    for line in unplaceable(recipe, nodes):
        text, _, fix = line.partition("). ")
        if unseen:
            text = text + "); a run waits for KubeRay's autoscaler"
            fix = "set SMALTI_WORKER_GROUPS (deploy/kuberay)"
            checks.append(Check("room", "note", text, fix))
        else:
            checks.append(Check("room", "problem", text + ")", fix))
    for line in shortages(recipe, nodes):
        checks.append(Check("room", "note", f"{line}: it runs with fewer"))
    return checks or [Check("room", "ok", f"every stage of {recipe.name} can be placed")]


def local_room(recipe: Recipe) -> list[Check]:
    """The same for a local session, which shares its cores among as many CPUs as the recipe asks
    for, and with `resources.device: cpu` says it has as many GPUs.
    """
    import torch

    from smalti.workflows.cluster.placement import Node, Nodes

    gpus = 1e6 if recipe.resources.device == "cpu" else float(torch.cuda.device_count())
    return room_checks(recipe, Nodes([Node("this machine", {"CPU": 1e6, "GPU": gpus})]))
