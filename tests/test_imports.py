"""Imports: they go down only, lazy ones too; no circles; and the links that editors follow.

Covers: smalti/__init__.py, smalti/api.py.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smalti

ROOT = Path(__file__).resolve().parents[1]
# each may import itself and those after it
ROOMS = (
    "tune",
    "workflows",
    "mllm",
    "tokenizers",
    "smalti",
)
INSIDE = (  # rooms and files of workflows/: each may import itself and those before it
    "tracking", "cluster", "pipeline", "sources", "corpus", "train", "encoder", "features", "codebook", "plan",
    "systems", "evaluation", "report", "tokenizer", "tokens", "mllm", "bridge", "export", "recipe_plan", "chain",
    "quickstart", "smoke",
)  # fmt: skip
# package: rooms from the top that may import it
ONLY_ABOVE = {
    "ray": 2,
    "deepspeed": 2,
    "mlflow": 2,
}
NO_TORCH = ("torch", "transformers", "safetensors", "torchvision")
LAZY_EXCEPTIONS = ("smalti/api.py", "smalti/cli")  # they load upper rooms inside functions


def sources() -> list[Path]:
    """Every file of source, through no link."""
    found = (path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return sorted(path for path in found if path.resolve() == path)


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, inside a function) of every import in a file; `from a import b` counts as a.b
    too.
    """
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


def module_of(path: Path) -> str:
    """`smalti.mllm.model` of mllm/model.py, `smalti.mllm` of its `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    named = parts if parts[0] == "smalti" else ("smalti", *parts)
    return ".".join(named[:-1] if named[-1] == "__init__" else named)


def strip_type_checking(tree: ast.Module) -> ast.Module:
    """The module without `if TYPE_CHECKING:` blocks."""
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(body, list):
                body[:] = [
                    item
                    for item in body
                    if not (isinstance(item, ast.If) and "TYPE_CHECKING" in ast.dump(item.test))
                ] or ([ast.Pass()] if body else [])
    return tree


def graph(files: dict[str, str], excepted: frozenset[str] = frozenset()) -> dict[str, set[str]]:
    """Modules that each module imports, lazily too but for those `excepted`; `files`: source by
    module.
    """
    found: dict[str, set[str]] = {}
    for module, text in files.items():
        tree = strip_type_checking(ast.parse(text))
        lazy = {
            id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)
        }
        names = set[str]()
        for node in ast.walk(tree):
            if id(node) in lazy and module in excepted:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {
                    full if (full := f"{node.module}.{a.name}") in files else node.module or ""
                    for a in node.names
                }
        found[module] = {name for name in names if name in files} - {module}
    return found


def circle_of(arrows: dict[str, set[str]]) -> list[str]:
    """Some circle of imports, [] if there is none."""
    done, path = set[str](), list[str]()

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(arrows[module]):
            if circle := visit(other):
                return circle
        path.pop()
        done.add(module)
        return []

    return next((circle for module in sorted(arrows) if (circle := visit(module))), [])


EXCEPTED = ("smalti.cli", "smalti.api", "smalti")
"""The command line and `smalti.load_*` load upper rooms lazily (ARCHITECTURE: the two exceptions).
"""


def all_arrows() -> dict[str, set[str]]:
    files = {module_of(path): path.read_text(encoding="utf-8") for path in sources()}
    return graph(
        files,
        frozenset(name for name in files if name in EXCEPTED or name.startswith("smalti.cli.")),
    )


def test_no_import_circle_lazy_imports_counted() -> None:
    circle = circle_of(all_arrows())
    assert not circle, " → ".join(circle)


def test_a_circle_behind_a_lazy_import_is_found() -> None:
    files = {
        "smalti.a": "def f():\n    from smalti.b import g\n",
        "smalti.b": "import smalti.a\ndef g(): pass\n",
    }
    assert circle_of(graph(files)) == ["smalti.a", "smalti.b", "smalti.a"]
    typed = files | {
        "smalti.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from smalti.b import g\n"
    }
    assert circle_of(graph(typed)) == []


def test_rooms_of_workflows_import_only_those_below() -> None:
    order = {name: place for place, name in enumerate(INSIDE)}
    prefix = "smalti.workflows."
    for module, imported in all_arrows().items():
        for other in imported:
            if module.startswith(prefix) and other.startswith(prefix):
                here, there = (name.removeprefix(prefix).split(".")[0] for name in (module, other))
                assert order[there] <= order[here], f"{module} imports {other}, which lies above it"


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
        assert top not in ("mllm", "workflows", "tune", "bench", "tests"), (
            f"{module}: import it as smalti.{module}"
        )
        room = room_of(module)
        if room is not None:
            assert ROOMS.index(room) >= here or (lazy and is_excepted(path)), (
                f"{module} lies above {ROOMS[here]}"
            )
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
    assert not (ROOT / "tokenizers" / "__init__.py").exists(), (
        "it would hide Hugging Face's tokenizers from the root"
    )


def test_the_rooms_are_the_folders_at_the_root() -> None:
    import smalti.mllm
    import smalti.tokenizers
    import smalti.tune
    import smalti.workflows

    for room in (smalti.mllm, smalti.tokenizers, smalti.tune, smalti.workflows):
        assert [Path(path).resolve() for path in room.__path__] == [
            ROOT / room.__name__.split(".")[-1]
        ]
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
def test_imports_in_a_fresh_process(place: str, tmp_path: Path) -> None:
    """From the root, where `tokenizers/` lies in the working directory, and from elsewhere with the
    root on the path.
    """
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
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_names_of_the_package() -> None:
    assert callable(smalti.load_tokenizer)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        smalti.nothing  # noqa: B018
