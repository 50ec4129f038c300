"""Description of the machine that wrote the report."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TypedDict

from smalti.artifact import package_versions


class Machine(TypedDict):
    """The node that wrote the report.

    `cores` and `memory_bytes` are what this process may use.
    """

    system: str
    cpu: str
    cores: int
    memory_bytes: int
    gpus: list[str]
    versions: dict[str, str]


def machine() -> Machine:
    """The CPU, memory, GPUs and package versions of this process."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else (os.cpu_count() or 1),
        "memory_bytes": memory_bytes(),
        "gpus": gpus,
        "versions": package_versions(),
    }


def cpu_name() -> str:
    """Name of the processor if the system reports it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total
