"""Check types with mypy as the package is imported: `python scripts/typecheck.py [mypy options]`.

mypy knows nothing of the bridge in smalti/__init__.py, and would take `tokenizers/` for Hugging Face's package. So it is
shown the layout of the wheel, made of links, and its messages are turned back into paths of the checkout.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("tokenizers", "mllm", "workflows", "tune")
TREE = ROOT / ".mypy_cache" / "tree"


def lay_out() -> None:
    """.mypy_cache/tree/smalti: links to what smalti/ holds, and to the rooms."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "smalti"
    package.mkdir(parents=True)
    for item in [*(ROOT / "smalti").iterdir(), *(ROOT / room for room in ROOMS)]:
        if item.name != "__pycache__":
            (package / item.name).symlink_to(item, target_is_directory=item.is_dir())
    (TREE / "scripts").symlink_to(ROOT / "scripts", target_is_directory=True)


def main() -> int:
    lay_out()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *sys.argv[1:]]
    done = subprocess.run([*command, "smalti", "scripts"], cwd=TREE, stdout=subprocess.PIPE, text=True)
    text = done.stdout
    for room in ROOMS:
        text = text.replace(f"smalti/{room}/", f"{room}/")
    sys.stdout.write(text)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
