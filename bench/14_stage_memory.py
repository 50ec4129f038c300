"""Memory (goal "14"): peak resident memory of each process of corpus, features and tokens, 20,000
images against 2,000.

Pictures of 64 px, shards of 500, one actor, random encoder and tokenizer; the stages run as the
command line runs them. A process's peak is VmHWM of /proc, read five times a second. `ratio` is the
worst of driver and workers; the goal is 1.1 at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from bench.machine import machine
from bench.pictures import save_encoder, save_tokenizer

SIZES, STAGES, GOAL = (2_000, 20_000), ("corpus", "features", "tokens"), 1.1


def peak_mb(process: psutil.Process) -> float:
    """VmHWM in MB; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def role(process: psutil.Process, driver: int) -> str | None:
    """`driver`, `worker` (a Ray actor that works on shards), or None for Ray's own processes."""
    if process.pid == driver:
        return "driver"
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return None
    return "worker" if title.startswith("ray::") and "MapWorker" in title else None


def peaks(command: list[str]) -> dict[str, float]:
    """Largest peak in MB by role of a command's process tree. Errors: CalledProcessError."""
    found: dict[str, float] = {}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log) as running,
    ):
        root = psutil.Process(running.pid)
        while running.poll() is None:
            for process in [root, *root.children(recursive=True)]:
                name = role(process, running.pid)
                if name is not None:
                    found[name] = max(found.get(name, 0.0), peak_mb(process))
            time.sleep(0.2)
        if running.returncode:
            log.seek(0)
            print(log.read().decode()[-2000:], file=sys.stderr)
            raise subprocess.CalledProcessError(running.returncode, command)
    return found


def main() -> None:
    table: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        print(save_encoder(f"{folder}/encoder", 64, 8, 128, 3))
        for size in SIZES:
            recipe = Path(folder, f"{size}.yaml")
            recipe.write_text(
                f"out: {folder}/{size}\n"
                f"corpus: {{source: 'generated:{size}', image_size: 64, shard_images: 500}}\n"
                f"encoder: {{pretrained: {folder}/encoder}}\nfeatures: {{patches: 16}}\ntracking: {{uri: 'off'}}\n"
            )
            save_tokenizer(f"{folder}/{size}", f"{folder}/encoder", 64)
            for stage in ("corpus", "encoder", "features", "tokens"):
                command = [sys.executable, "-m", "smalti", stage, str(recipe)]
                measured = peaks(command)
                for name, value in measured.items() if stage in STAGES else ():
                    table.setdefault(f"{stage}/{name}", []).append(value)
    ratios = {name: values[1] / values[0] for name, values in table.items()}
    for name, values in table.items():
        print(
            f"{name}: {values[0]:,.0f} MB at {SIZES[0]:,} images, {values[1]:,.0f} MB at {SIZES[1]:,}: {ratios[name]:.3f}x"
        )
    worst = max(ratios.values())
    whole = len(table) == 2 * len(STAGES)
    result = {
        "goal": 14,
        "ratio": round(worst, 3),
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "quality": float(whole),
        "met": bool(whole and worst <= GOAL),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
