"""What the GPU benchmarks share: device, timing, memory, peaks, one table.

They need no Ray; `--tiny` runs on any CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from smalti.workflows.cluster.gpu_specs import bf16_peak

RESULTS = Path(__file__).resolve().parent / "results"


def arguments(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """`--tiny`, `--turns` and `--out`; without a GPU only `--tiny` runs."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes, on the CPU: does it run at all?"
    )
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument(
        "--out",
        type=Path,
        help="file of results that this one is added to (default: bench/results/DATE-DEVICE-gpu.json)",
    )
    found = parser.parse_args(argv)
    if not found.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --tiny runs on the CPU")
    found.device = torch.device("cpu" if found.tiny else "cuda")
    found.turns = 1 if found.tiny else found.turns
    if found.out is None and not found.tiny:
        device = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name())
        found.out = RESULTS / f"{datetime.date.today().isoformat()}-{device}-gpu.json"
    return found


def seconds(call: Callable[[], Any], device: torch.device, turns: int, warm: int = 3) -> float:
    """Median wall seconds of a call that ends with the device idle."""
    for _ in range(warm if device.type == "cuda" else 0):
        call()
    times = []
    for _ in range(turns):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def extra_bytes(call: Callable[[], Any], device: torch.device) -> float:
    """Peak device memory of a call beyond what was allocated before it; nan on the CPU."""
    if device.type != "cuda":
        return float("nan")
    wait(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait(device)
    return float(torch.cuda.max_memory_allocated() - before)


def peak_share(flops_s: float, device: torch.device) -> float:
    """Share of the device's bf16 peak; nan where that is not known."""
    peak = bf16_peak(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return flops_s / (peak or float("nan"))


def report(
    title: str,
    rows: Sequence[tuple[str, float, str]],
    goals: dict[str, tuple[str, float]],
    asked: argparse.Namespace,
) -> None:
    """Print (measure, value, unit) as a table with its goals, (`>=` or `<=`, value) by measure; the
    last line is JSON, and is added to the file `--out`, in place of an earlier one of this
    script.
    """
    tiny: bool = asked.tiny
    print(f"{title}{' (tiny: figures mean nothing)' if tiny else ''}")
    met: dict[str, bool] = {}
    for name, value, unit in rows:
        goal = goals.get(name)
        if goal is not None and not tiny:
            met[name] = value >= goal[1] if goal[0] == ">=" else value <= goal[1]
        verdict = (
            f"goal {goal[0]} {goal[1]:g}"
            + (f", {'met' if met[name] else 'missed'}" if name in met else "")
            if goal
            else ""
        )
        print(f"  {name:<44} {value:>12.4g} {unit:<10} {verdict}".rstrip())
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    result = {
        "goal": title.partition(":")[0],
        "date": datetime.date.today().isoformat(),
        "machine": machine,
    }
    result |= {"torch": torch.__version__, "tiny": tiny, "met": bool(met) and all(met.values())}
    result |= {"goals": {name: list(goal) for name, goal in goals.items()}}
    result |= {"measures": {name: None if value != value else value for name, value, _ in rows}}
    print(json.dumps(result))
    if asked.out is not None:
        standing = json.loads(asked.out.read_text()) if asked.out.exists() else []
        others = [item for item in standing if item["goal"] != result["goal"]]
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(
            json.dumps(sorted([*others, result], key=lambda item: item["goal"]), indent=2) + "\n"
        )
