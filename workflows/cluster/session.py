"""A Ray session: an existing cluster, or a local one that is stopped afterwards."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import smalti
from smalti.errors import ConfigError
from smalti.progress import log
from smalti.workflows.cluster import placement

if TYPE_CHECKING:
    from smalti.schema import Recipe

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no usage statistics
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
STORE_FRACTION = 0.1  # shards are passed by name; the object store holds receipts and centroids
STORE_MIN_BYTES, STORE_MAX_BYTES = 128 * 2**20, 16 * 2**30


@contextmanager
def ensure_ray(recipe: Recipe, *, placed: bool = True) -> Iterator[None]:
    """Connect to Ray; nested calls reuse the session of the outer call.

    With RAY_ADDRESS set (also inside `ray job submit`) it joins that cluster. Otherwise it starts a
    local one with all the cores, and at least what `resources` requests, so that a small machine is
    slow instead of waiting forever.

    Args:
        placed: whether to check that a session opened here can place what the recipe's `resources`
            request.

    Raises:
        ConfigError: if it can never place them (Ray would wait forever).
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    if not recipe.resources.gpus_per_worker:
        # transformers loads DeepSpeed, which warns if it has to guess
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import ray

    if ray.is_initialized():
        quiet_ray_data()
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=remote_env())
        log(f"ray: connected to {os.environ['RAY_ADDRESS']}")
    else:
        _start_local(recipe)
    quiet_ray_data()
    try:
        if placed:
            placement.check(recipe)
        yield
    finally:
        ray.shutdown()


def quiet_ray_data() -> None:
    """Disable Ray Data's progress bars and INFO logs: the stages have their own."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def want_gpus(gpus_a_worker: float) -> None:
    """Check that the session has as many GPUs as one worker needs.

    On a cluster, which may still add nodes, a lack is only logged.

    Raises:
        ConfigError: on a local session, where Ray would wait forever.
    """
    import ray

    found = ray.cluster_resources().get("GPU", 0)
    if gpus_a_worker <= found:
        return
    lack = f"resources.gpus_per_worker={gpus_a_worker:g}, and Ray knows of {found:g} GPUs"
    if os.environ.get("RAY_ADDRESS"):
        log(f"ray: {lack}: waiting for a node with GPUs")
        return
    raise ConfigError(
        f"{lack} on this machine. Set it to 0, or RAY_ADDRESS to a cluster with GPUs; with "
        "resources.device=cpu features and tokens run without."
    )


def checkout_root() -> str | None:
    """Root of the checkout, for the workers' path; None for an installed wheel."""
    root = Path(smalti.__file__).resolve().parent.parent
    return (
        str(root) if (root / "pyproject.toml").exists() and (root / "workflows").is_dir() else None
    )


def remote_env() -> dict[str, str | list[str]] | None:
    """Ray's runtime environment with which workers import smalti.

    None inside a job, which has its working directory already.
    """
    root = checkout_root()
    if root is None or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return None
    return {"working_dir": root, "excludes": [".git", ".venv", ".data", "out"]}


def _start_local(recipe: Recipe) -> None:
    """Start Ray on this machine.

    Its processes inherit PYTHONPATH, so that Ray can use its idle workers.
    """
    import ray

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
    resources = recipe.resources
    wanted = max(
        resources.max_workers * resources.cpus_per_worker, resources.actors, resources.readers
    )
    if wanted > cores:
        log(f"ray: the recipe requests {wanted} CPUs, this machine has {cores}; workers share them")
    gpus = resources.gpus_per_worker * max(resources.actors, resources.max_workers)
    before = os.environ.get("PYTHONPATH")
    root = checkout_root()
    if root is not None:
        os.environ["PYTHONPATH"] = root + (os.pathsep + before if before else "")
    try:
        context = ray.init(
            address="local",
            num_cpus=max(cores, wanted),
            num_gpus=math.ceil(gpus) if resources.device == "cpu" and gpus else None,
            include_dashboard=True,  # without it a cleanup actor logs a warning every second
            dashboard_host="127.0.0.1",
            object_store_memory=_store_bytes(),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    finally:
        if root is not None:
            os.environ.pop("PYTHONPATH", None) if before is None else os.environ.update(
                PYTHONPATH=before
            )
    log(
        f"ray: started on this machine with {max(cores, wanted)} CPUs; dashboard "
        f"{context.dashboard_url or 'not available'}"
    )


def _store_bytes() -> int:
    """Bytes of the local object store.

    A tenth of the memory that this process may use, limited by the free space of /dev/shm.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(limit_file):
            limit = Path(limit_file).read_text().strip()
            total = min(total, int(limit)) if limit.isdigit() else total
    size = min(max(int(total * STORE_FRACTION), STORE_MIN_BYTES), STORE_MAX_BYTES)
    if os.path.isdir("/dev/shm"):
        # 75 MiB is Ray's minimum
        size = max(min(size, int(shutil.disk_usage("/dev/shm").free * 0.8)), 80 * 2**20)
    return size
