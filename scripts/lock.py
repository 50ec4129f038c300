"""Write requirements.lock: `python scripts/lock.py`, inside a virtual environment whose tests pass.

Every package of the environment, pinned as installed, and what `torch` and the `gpu` extra add on a
Linux machine that installs from the registry alone. Plain `name==version` lines: no hashes (one
file serves CPU and CUDA builds of torch), no local paths, no local versions (`+cpu`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
SKIPPED = {"smalti", "pip"}
ELSEWHERE = ["torch", "faiss-gpu", "liger-kernel"]
HEADER = """\
# Every package, direct or not, pinned: the set that the tests pass with. Written by scripts/lock.py.
#   pip install -e '.[cpu,quickstart,dev]' -c requirements.lock
# A constraint installs nothing by itself: the last part holds what CUDA builds and the `gpu` extra add.
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Name to public version of what this environment holds."""
    found = {
        normal(d.metadata["Name"]): d.version.partition("+")[0]
        for d in importlib.metadata.distributions()
    }
    return {name: version for name, version in found.items() if name not in SKIPPED}


def resolved(pins: dict[str, str]) -> dict[str, str]:
    """What pip would install for ELSEWHERE from the registry, with `pins` held."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        environment = {k: v for k, v in os.environ.items() if k != "PIP_FIND_LINKS"} | {
            "PIP_CONFIG_FILE": os.devnull
        }
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
        ]
        subprocess.run([*command, "-c", str(constraints), *ELSEWHERE], check=True, env=environment)
        items = json.loads(report.read_text())["install"]
    return {
        normal(i["metadata"]["name"]): i["metadata"]["version"].partition("+")[0] for i in items
    }


def main() -> None:
    pins = installed()
    extra = {name: version for name, version in resolved(pins).items() if name not in pins}
    lines = [f"{name}=={version}" for name, version in sorted(pins.items())]
    lines += ["", "# CUDA builds of torch, and the gpu extra"]
    lines += [f"{name}=={version}" for name, version in sorted(extra.items())]
    LOCK.write_text(HEADER + "\n" + "\n".join(lines) + "\n")
    print(f"{LOCK.name}: {len(pins)} packages, {len(extra)} more for GPUs")


if __name__ == "__main__":
    main()
