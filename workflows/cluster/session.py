"""A Ray session for a stage: the cluster that is there, or a small local one that is stopped afterwards."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import smalti
from smalti.errors import ConfigError
from smalti.progress import log
from smalti.workflows.cluster import placement

if TYPE_CHECKING:
    from smalti.schema import Recipe

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
STORE_FRACTION = 0.1  # shards pass as names; the object store holds receipts and centroids
STORE_MIN_BYTES, STORE_MAX_BYTES = 128 * 2**20, 16 * 2**30


@contextmanager
def ensure_ray(recipe: Recipe, *, placed: bool = True) -> Iterator[None]:
    """Ray is connected inside; nested calls reuse the session, and only the call that opened it closes it.

    With `placed` a session that is opened here is looked at first: ConfigError when it could never hold what the recipe's
    `resources` ask for (Ray would wait for ever).

    With RAY_ADDRESS set (also inside `ray job submit`) it joins that cluster; otherwise it starts a local one with all
    the cores, and at least what `resources` asks for, so that a small machine is slow instead of waiting for ever.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    if not recipe.resources.gpus_per_worker:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers loads DeepSpeed, which warns where it must guess
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
    """Ray Data without its own progress output and INFO lines: the stages show theirs."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def want_gpus(gpus_a_worker: float) -> None:
    """Nothing, when the session has as many GPUs as one worker wants; a line on a cluster, which may be growing.

    Errors: ConfigError on a session of this machine alone, where the worker would be waited for without end.
    """
    import ray

    found = ray.cluster_resources().get("GPU", 0)
    if gpus_a_worker <= found:
        return
    told = f"resources.gpus_per_worker={gpus_a_worker:g}, and Ray knows of {found:g} GPUs"
    if os.environ.get("RAY_ADDRESS"):
        log(f"ray: {told}: waiting for a node that has one")
        return
    raise ConfigError(
        f"{told} on this machine. Set it to 0, or RAY_ADDRESS to a cluster with GPUs; resources.device=cpu lets features and "
        "tokens run without."
    )


def checkout_root() -> str | None:
    """Folder to put on a worker's path: the root of the checkout, None when smalti is an installed wheel."""
    root = Path(smalti.__file__).resolve().parent.parent
    return str(root) if (root / "pyproject.toml").exists() and (root / "workflows").is_dir() else None


def remote_env() -> dict[str, Any] | None:
    """What workers of a cluster need to import smalti. A job brought its working directory along already."""
    root = checkout_root()
    if root is None or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return None
    return {"working_dir": root, "excludes": [".git", ".venv", ".data", "out"]}


def _start_local(recipe: Recipe) -> None:
    """Start Ray on this machine; its processes inherit PYTHONPATH, which keeps Ray's idle workers usable."""
    import ray

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    resources = recipe.resources
    wanted = max(resources.max_workers * resources.cpus_per_worker, resources.actors, resources.readers)
    if wanted > cores:
        log(f"ray: the recipe asks for {wanted} CPUs, this machine has {cores}; they are shared")
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
            include_dashboard=True,  # without it a cleaner actor logs a warning every second
            dashboard_host="127.0.0.1",
            object_store_memory=_store_bytes(),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    finally:
        if root is not None:
            os.environ.pop("PYTHONPATH", None) if before is None else os.environ.update(PYTHONPATH=before)
    log(f"ray: started here with {max(cores, wanted)} CPUs; dashboard {context.dashboard_url or 'not available'}")


def _store_bytes() -> int:
    """Size of the local object store: a tenth of the memory that this process may use, and what /dev/shm can hold."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(limit_file):
            limit = Path(limit_file).read_text().strip()
            total = min(total, int(limit)) if limit.isdigit() else total
    size = min(max(int(total * STORE_FRACTION), STORE_MIN_BYTES), STORE_MAX_BYTES)
    if os.path.isdir("/dev/shm"):
        size = max(min(size, int(shutil.disk_usage("/dev/shm").free * 0.8)), 80 * 2**20)  # 75 MiB is Ray's least
    return size
