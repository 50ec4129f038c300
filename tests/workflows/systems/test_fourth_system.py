"""A fourth system: two modules and a recipe, and a line or an import in three existing files.

`patchvq/` holds the modules and the recipe. They are added to a copy of the source, with the edits
of `EDITS`: the schema's dict, the dict of saved tokenizers, and the dict of systems. No other file
of the copy changes, and the whole chain runs, on Ray's workers too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ADDED = Path(__file__).parent / "patchvq"
PACKAGES = ("smalti", "tokenizers", "mllm", "workflows", "tune", "recipes")
FUTURE = "from __future__ import annotations\n"
EDITS = {
    "smalti/schema/systems.py": [
        (
            "SYSTEMS: dict[str, SystemKeys] = {\n",
            '    "patchvq": SystemKeys(clusters=lambda tokenizer: False),\n',
        ),
    ],
    "tokenizers/loading.py": [
        (FUTURE, "from smalti.tokenizers import patchvq\n"),
        ("SYSTEMS: dict[str, type[SavedTokenizer]] = {\n", '    "patchvq": patchvq.PatchVQ,\n'),
    ],
    "workflows/systems/registry.py": [
        (FUTURE, "from smalti.workflows.systems.patchvq import PatchVQSystem\n"),
        ("for system in (", "PatchVQSystem(), "),
    ],
}
"""Of each existing file: a text that it holds once, and what is added after it."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source with the fourth system in it."""
    root = tmp_path / "tree"
    for name in PACKAGES:
        shutil.copytree(
            ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ADDED / "tokenizer.py", root / "tokenizers/patchvq.py")
    shutil.copy(ADDED / "system.py", root / "workflows/systems/patchvq.py")
    for name, additions in EDITS.items():
        text = (root / name).read_text()
        for place, addition in additions:
            assert text.count(place) == 1, f"{name} holds {place!r} {text.count(place)} times"
            text = text.replace(place, place + addition)
        (root / name).write_text(text)
    return root


def smalti(tree: Path, *arguments: str) -> str:
    """Output of the command in that copy."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")
    }
    environment = kept | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-m", "smalti", *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_at_most_three_existing_files_change() -> None:
    assert len(EDITS) <= 3
    assert sorted(path.name for path in ADDED.iterdir() if path.is_file()) == [
        "recipe.yaml",
        "system.py",
        "tokenizer.py",
    ]


@pytest.mark.slow
def test_a_fourth_system_runs_the_whole_chain(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    smalti(tree, "run", str(ADDED / "recipe.yaml"), "--smoke", f"out={out}", "resources.workers=1")
    finished = tmp_path / "out-smoke"
    assert json.loads((finished / "tokenizer/config.json").read_text())["system"] == "patchvq"
    assert not (finished / "codebook").exists()
    scores = json.loads((finished / "report.json").read_text())["scores"]
    assert scores["reconstruction/psnr"]["value"] > 10
    assert {"codes/usage", "codes/perplexity", "qa/accuracy"} <= {*scores}


def test_the_planner_counts_a_fourth_system(tree: Path) -> None:
    assert "mllm" in smalti(tree, "plan", str(ADDED / "recipe.yaml"))
