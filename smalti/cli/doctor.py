"""`smalti doctor`: what this machine and cluster have, what is missing, and how to fix it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import smalti
from smalti import storage
from smalti.artifact import code_version
from smalti.cli.check import MIN_DISK_BYTES, Check, gib
from smalti.cli.doctor_cluster import cluster_checks, local_room
from smalti.config import load_recipe
from smalti.errors import SmaltiError
from smalti.schema import Recipe

ROOT = Path(smalti.__file__).resolve().parents[1]
NEEDED = (
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "mlflow",
    "pyarrow",
    "numpy",
    "pydantic",
    "pillow",
    "safetensors",
    "fsspec",
)
OPTIONAL = {  # module: what it serves, and the extra that brings it
    "faiss": ("faster k-means in the cells of a codebook", "cpu"),
    "liger_kernel": ("fused kernels on NVIDIA GPUs", "gpu"),
    "easy_vqa": ("the quickstart's images", "quickstart"),
}
MIN_MEMORY_BYTES = 4 * 2**30


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="also whether the stages of this recipe can be placed",
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="its keys with other values"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder or URL that runs would write to (default: the recipe's, else out)",
    )
    parser.add_argument(
        "--wait", metavar="SECONDS", type=float, default=0.0,
        help="with a RECIPE: ask the cluster's autoscaler for its nodes first, and wait so long for them",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides) if arguments.recipe else None
    out = arguments.out or (recipe.out if recipe else "out")
    groups: dict[str, list[Callable[[], list[Check]]]] = {
        "software": [_python, _packages, _optional_packages, _compiler],
        "machine": [_cores, _memory, lambda: _disk(out), _gpus],
        "cluster": [lambda: _ray(out, recipe, arguments.wait)],
        "data": [_data],
    }
    found: list[Check] = []
    for title, checks in groups.items():
        print(title)
        for check in checks:
            for item in check():
                print(item.line(), flush=True)
                found.append(item)
        print()
    problems = [item.name for item in found if item.state == "problem"]
    if problems:
        raise SmaltiError(f"{len(problems)} to fix before smalti can run: {', '.join(problems)}")
    print("ready: `smalti quickstart` should run here")


def _python() -> list[Check]:
    version = platform.python_version()
    checks = [Check("smalti", "ok", f"{code_version()} in {Path(smalti.__file__).parent}")]
    return [*checks, Check("python", "ok", f"{version} ({platform.platform()})")]


def _packages() -> list[Check]:
    """Needed packages, and how they differ from requirements.lock where there is one."""
    lock = read_lock(ROOT / "requirements.lock")
    install = _install("cpu,quickstart,dev")
    versions = {}
    absent = []
    for name in NEEDED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    checks = [
        Check(
            "packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items())
        )
    ]
    if absent:
        checks.append(Check("packages", "problem", f"not installed: {', '.join(absent)}", install))
    others = [
        f"{n} {v} (lock: {lock[n]})"
        for n, v in versions.items()
        if n in lock and v.partition("+")[0] != lock[n]
    ]
    if others:
        checks.append(
            Check("lock", "missing", f"other versions than tested: {', '.join(others)}", install)
        )
    elif lock:
        checks.append(Check("lock", "ok", "these are the versions of requirements.lock"))
    return checks


def _install(extras: str) -> str:
    if (ROOT / "requirements.lock").is_file():
        return f"pip install -e '.[{extras}]' -c requirements.lock"
    return f"pip install 'smalti[{extras}]'"


def read_lock(path: Path) -> dict[str, str]:
    """Name to version of a lock file; empty where there is none (a wheel)."""
    if not path.is_file():
        return {}
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def _optional_packages() -> list[Check]:
    checks = []
    for module, (use, extra) in OPTIONAL.items():
        found = importlib.util.find_spec(module) is not None
        fix = f"optional ({use}): {_install(extra)}"
        checks.append(
            Check(module, "ok", "installed")
            if found
            else Check(module, "missing", "not installed", fix)
        )
    return checks


def _compiler() -> list[Check]:
    """DeepSpeed compiles an operator when it is first used: g++ and ninja."""
    beside = Path(sys.executable).parent / "ninja"
    ninja = shutil.which("ninja") or (str(beside) if beside.exists() else None)
    found = {"g++": shutil.which("g++") or shutil.which("c++"), "ninja": ninja}
    fixes = {
        "g++": "training needs it: apt-get install g++",
        "ninja": "training needs it: pip install ninja",
    }
    return [
        Check(n, "ok", path) if path else Check(n, "problem", "not found", fixes[n])
        for n, path in found.items()
    ]


def _cores() -> list[Check]:
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return [Check("cores", "ok", f"{usable} usable of {os.cpu_count()}")]


def _memory() -> list[Check]:
    import psutil

    memory = psutil.virtual_memory()
    limit = _cgroup_limit()
    total = min(memory.total, limit) if limit else memory.total
    text = f"{gib(total)}, {gib(min(memory.available, total))} free"
    if total < MIN_MEMORY_BYTES:
        return [
            Check(
                "memory",
                "missing",
                text,
                "the quickstart needs 4 GiB; with less the kernel may kill it",
            )
        ]
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    small = shared < 128 * 2**20
    fix = "Ray keeps objects there: give the container --shm-size=1g or more" if small else ""
    return [
        Check("memory", "ok", text),
        Check("/dev/shm", "missing" if small else "ok", f"{gib(shared)} free", fix),
    ]


def _cgroup_limit() -> int | None:
    """Memory limit of this container in bytes, where one is set."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < 2**60 else None
    return None


def _disk(out: str) -> list[Check]:
    """Free space and permission to write the output of runs."""
    if not storage.is_local(out):
        return _remote(out)
    out = storage.local_path(out)
    folder = Path(out).expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    checks = [Check("disk", "ok", f"{gib(free)} free for {out}")]
    if free < MIN_DISK_BYTES:
        checks = [
            Check(
                "disk",
                "missing",
                f"{gib(free)} free for {out}",
                "free some space: a quickstart needs about 1 GiB, Ray more",
            )
        ]
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        checks.append(
            Check(
                "writing",
                "problem",
                f"{folder}: {error.strerror}",
                "set another `out`, or fix the permissions",
            )
        )
    else:
        checks.append(Check("writing", "ok", f"{folder} can be written to"))
    return checks


def _remote(out: str) -> list[Check]:
    """Permission to write to an object store."""
    probe = storage.join(out, f".smalti-doctor-{os.getpid()}")
    try:
        storage.write_atomic(probe, b"")
        storage.remove(probe)
    except SmaltiError as error:
        return [
            Check(
                "writing",
                "problem",
                str(error).splitlines()[0],
                "fix the credentials, or set another `out`",
            )
        ]
    return [Check("writing", "ok", f"{out} can be written to")]


def _gpus() -> list[Check]:
    """GPUs that torch finds, or why it does not find those of the driver."""
    try:
        import torch
    except ImportError:
        return []
    driver = shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        text = ", ".join(f"{item.name} ({gib(item.total_memory)})" for item in names)
        return [Check("GPUs", "ok", f"{len(names)}: {text}")]
    if driver:
        fix = "torch is a CPU build or the driver is too old: pip install --force-reinstall torch -c requirements.lock"
        return [
            Check(
                "GPUs",
                "missing",
                f"nvidia-smi is here, and torch {torch.__version__} sees none",
                fix,
            )
        ]
    return [Check("GPUs", "note", "none: everything runs on the CPU, at small sizes")]


def _ray(out: str = "out", recipe: Recipe | None = None, wait_s: float = 0.0) -> list[Check]:
    """The cluster that a run would join; without one a run starts a local session."""
    address = os.environ.get("RAY_ADDRESS")
    mode = os.environ.get("RAY_AUTH_MODE", "")
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file.is_file()
    checks = []
    if mode == "token" and not has_token:
        checks.append(
            Check(
                "ray token",
                "problem",
                f"RAY_AUTH_MODE=token, and no token at {token_file}",
                "ray get-auth-token --generate",
            )
        )
    if not address:
        checks.append(
            Check(
                "ray",
                "note",
                "RAY_ADDRESS is not set: a run starts a local session of its own and stops it",
            )
        )
        return checks if recipe is None else [*checks, *local_room(recipe)]
    if address.startswith("http"):
        inside = "to look at the nodes: ray job submit --working-dir . -- python -m smalti doctor"
        return [*checks, Check("ray", "note", f"{address} takes jobs; {inside}")]
    if any(item.state == "problem" for item in checks):
        return checks
    return [*checks, *_reach(address, mode, out, recipe, wait_s)]


def _reach(address: str, mode: str, out: str, recipe: Recipe | None, wait_s: float) -> list[Check]:
    """The cluster, and what a task on each of its nodes finds."""
    import ray

    from smalti.workflows.cluster.checks import asks_for_token
    from smalti.workflows.cluster.session import remote_env

    here = ray.is_initialized()
    try:
        if not here:
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env=remote_env(),
            )
        guarded = token_check(asks_for_token(ray.get_runtime_context().gcs_address))
        found = cluster_checks(out, recipe, wait_s)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        total = ray.cluster_resources()
        text = f"{address}: {len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        return [Check("ray", "ok", text), guarded, *found]
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = (
            "is it running? `ray status`; a cluster with tokens needs RAY_AUTH_MODE=token"
            if mode != "token"
            else "`ray status`"
        )
        return [Check("ray", "problem", f"{address} cannot be reached ({reason})", fix)]
    finally:
        if not here and ray.is_initialized():
            ray.shutdown()


def token_check(asked: bool | None) -> Check:
    """asked: whether the cluster turned a client without a token away."""
    if asked:
        return Check("ray token", "ok", "a client without a token is turned away")
    if asked is None:
        return Check(
            "ray token",
            "note",
            "whether the cluster asks for a token could not be tried: no answer to a client",
        )
    fix = "whoever reaches its ports runs code there: RAY_AUTH_MODE=token on every node and client (docs/cluster.md)"
    return Check("ray token", "missing", "a client without a token came in", fix)


def _data() -> list[Check]:
    """Optional data of the recipes."""
    lpips = Path(".data/lpips-vgg16.safetensors")
    stamps = Path(".data/stamps")
    checks = []
    for name, path, use, script in (
        ("LPIPS weights", lpips, "perceptual loss", "scripts/fetch_lpips.py"),
        ("stamps", stamps, "a small corpus of drawings", "scripts/fetch_stamps.py"),
    ):
        here = path if path.exists() else ROOT / path
        fix = f"optional ({use}): python {script}, in a checkout"
        checks.append(
            Check(name, "ok", str(here))
            if here.exists()
            else Check(name, "missing", "not found", fix)
        )
    hub = os.environ.get("HF_HUB_OFFLINE")
    if hub and hub != "0":
        checks.append(
            Check(
                "Hugging Face",
                "note",
                "HF_HUB_OFFLINE is set: only models in its cache can be loaded",
            )
        )
    return checks
