"""The import bridge, and the rule that imports go down only: tune → workflows → mllm → tokenizers → smalti."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smalti

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("tune", "workflows", "mllm", "tokenizers", "smalti")  # each may import itself and those after it
ONLY_ABOVE = {"ray": 2, "deepspeed": 2, "mlflow": 2}  # package: rooms from the top that may import it
NO_TORCH = ("torch", "transformers", "safetensors", "torchvision")
LAZY_EXCEPTIONS = ("smalti/api.py", "smalti/cli")  # they load upper rooms inside functions


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, inside a function) of every import in a file; `from a import b` counts as a.b too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(f)
    }
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found += [(f"{node.module}.{alias.name}", id(node) in lazy) for alias in node.names]
    return found


def room_of(module: str) -> str | None:
    """The room that a module of ours lies in."""
    parts = module.split(".")
    if parts[0] != "smalti":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS[:-1] else "smalti"


def is_excepted(path: Path) -> bool:
    return str(path.relative_to(ROOT)).startswith(LAZY_EXCEPTIONS)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    here = ROOMS.index(path.relative_to(ROOT).parts[0])
    for module, lazy in imports_of(path):
        top = module.split(".")[0]
        assert top not in ("mllm", "workflows", "tune", "bench", "tests"), f"{module}: import it as smalti.{module}"
        room = room_of(module)
        if room is not None:
            assert ROOMS.index(room) >= here or (lazy and is_excepted(path)), f"{module} lies above {ROOMS[here]}"
        if top in ONLY_ABOVE:
            assert here < ONLY_ABOVE[top] or (lazy and is_excepted(path)), (
                f"{top} belongs to {ROOMS[: ONLY_ABOVE[top]]}"
            )
        if ROOMS[here] == "smalti" and top in NO_TORCH:
            assert lazy and is_excepted(path), f"the base does not import {top}"


def test_the_rule_finds_what_breaks_it(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("from smalti.workflows import chain\ndef f():\n    import ray.data\n")
    assert imports_of(file) == [("smalti.workflows.chain", False), ("ray.data", True)]
    assert room_of("smalti.workflows.chain") == "workflows"
    assert room_of("smalti.artifact") == "smalti"


def test_tokenizers_is_no_package_of_its_own() -> None:
    assert not (ROOT / "tokenizers" / "__init__.py").exists(), "it would hide Hugging Face's tokenizers from the root"


def test_the_rooms_are_the_folders_at_the_root() -> None:
    import smalti.mllm
    import smalti.tokenizers
    import smalti.tune
    import smalti.workflows

    for room in (smalti.mllm, smalti.tokenizers, smalti.tune, smalti.workflows):
        assert [Path(path).resolve() for path in room.__path__] == [ROOT / room.__name__.split(".")[-1]]
    import tokenizers

    assert "site-packages" in tokenizers.__file__
    assert hasattr(tokenizers, "Tokenizer")


CODE = """
import smalti, smalti.mllm, smalti.workflows, smalti.tune
from smalti.tokenizers import vit
import tokenizers, transformers
print(vit.__file__, tokenizers.Tokenizer.__module__, tokenizers.__file__)
"""


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_the_bridge_in_a_fresh_process(place: str, tmp_path: Path) -> None:
    """From the root, where `tokenizers/` lies in the working directory, and from elsewhere with the root on the path."""
    folder = ROOT if place == "root" else tmp_path
    code = CODE if place == "root" else f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CODE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, name, theirs = done.stdout.split()
    assert Path(ours).resolve() == ROOT / "tokenizers" / "vit.py"
    assert name == "tokenizers"
    assert "site-packages" in theirs


def test_the_base_is_light() -> None:
    """Help and recipes come without the seconds that torch and Ray take to load."""
    code = "import sys, smalti.cli.parser, smalti.config, smalti.artifact, smalti.shards, smalti.images; print([m for m in ('torch', 'ray', 'transformers', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_the_package() -> None:
    assert callable(smalti.load_tokenizer)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        smalti.nothing  # noqa: B018
