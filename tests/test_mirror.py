"""tests/ mirrors the source: a module has a test file of its name, or a line says where it is
tested.

The line stands in the docstring of a test file: `Covers: workflows/train/launch.py,
workflows/train/failures.py.`
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
ROOMS = ("smalti", "tokenizers", "mllm", "workflows", "tune")


def modules() -> list[str]:
    """Source files with code, as paths from the root: `mllm/model.py`."""
    found = [
        path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.resolve() == path
    ]
    coded = [path for path in found if len(ast.parse(path.read_text()).body) > 1]
    return sorted(path.relative_to(ROOT).as_posix() for path in coded)


def covered() -> dict[str, list[str]]:
    """Modules named in `Covers:` lines, each with the test files that name it."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for line in re.findall(r"Covers:((?:.|\n)*?)\.(?:\n|$)", text):
            for name in re.findall(r"[\w/]+\.py", line):
                found.setdefault(name, []).append(path.relative_to(TESTS).as_posix())
    return found


def own_file(module: str) -> Path:
    """Where the test file of a module's name is: `tests/mllm/test_model.py` of `mllm/model.py`."""
    path = Path(module)
    name = path.parent.name if path.stem == "__init__" else path.stem
    folder = path.parent.parent if path.stem == "__init__" else path.parent
    return TESTS / folder / f"test_{name}.py"


def test_every_module_has_its_tests_or_a_line_that_says_where() -> None:
    named = covered()
    missing = [
        module for module in modules() if not own_file(module).is_file() and module not in named
    ]
    assert not missing, (
        f"neither tests/…/test_NAME.py nor a `Covers:` line for {', '.join(missing)}"
    )


def test_covers_lines_name_modules_that_exist() -> None:
    known = set(modules())
    wrong = {name: files for name, files in covered().items() if name not in known}
    assert not wrong
