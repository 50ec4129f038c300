"""The wheel: complete, and working beside Hugging Face's `tokenizers` in one site-packages."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("tokenizers", "mllm", "workflows", "tune")


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_of(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "smalti" else ("smalti", *parts))


def code_folders() -> set[str]:
    """Packages that the folders of the checkout make."""
    files = [path for room in ("smalti", *ROOMS) for path in (ROOT / room).rglob("*.py")]
    return {package_of(path.parent) for path in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    import shutil

    copy = tmp_path_factory.mktemp("source") / "smalti"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "out", "build", "*.egg-info")
    copy.mkdir()
    for name in ("smalti", *ROOMS, "recipes"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("smalti-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that plays site-packages: the wheel, and beside it Hugging Face's `tokenizers`
    itself.
    """
    import tokenizers

    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    theirs = Path(tokenizers.__file__).parent
    (target / "tokenizers").symlink_to(theirs, target_is_directory=True)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with `installed` before everything, away from the checkout; the editable install is
    switched off.
    """
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')];"
        f"sys.path[:] = [{str(installed)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})];"
    )
    return subprocess.run(
        [sys.executable, "-c", code + arguments[0], *arguments[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_pyproject_names_every_package() -> None:
    named = set(settings()["tool"]["setuptools"]["packages"])
    assert named == code_folders() | {"smalti.recipes"}


def test_the_wheel_holds_every_module_and_recipe(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in ("smalti", *ROOMS):
        for path in (ROOT / room).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix()
            assert (inside if room == "smalti" else f"smalti/{inside}") in names
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"smalti/recipes/{path.name}" in names
    assert not [name for name in names if name.startswith(ROOMS) or "/tests/" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_wheel_keeps_the_two_tokenizers_apart(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "import smalti, smalti.mllm, smalti.workflows, smalti.tune, tokenizers, transformers;"
        "from smalti.tokenizers import vit, loading;"
        "print(vit.__file__); print(tokenizers.__file__); print(tokenizers.Tokenizer); print(list(smalti.__path__))"
    )
    done = run(installed, tmp_path, code)
    assert done.returncode == 0, done.stderr
    ours, theirs, _, path = done.stdout.splitlines()
    assert ours == str(installed / "smalti" / "tokenizers" / "vit.py")
    assert Path(theirs).parent == installed / "tokenizers"
    assert path == str([str(installed / "smalti")])


def test_the_installed_wheel_runs_commands_and_finds_its_recipes(
    installed: Path, tmp_path: Path
) -> None:
    main = "import sys; from smalti.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run(installed, tmp_path, main, "--version")
    assert (done.returncode, done.stdout) == (0, f"smalti {__import__('smalti').__version__}\n")
    code = "from smalti.config import load_recipe; print(load_recipe('semhitok-256').tokenizer.pixel.codes)"
    done = run(installed, tmp_path, code)
    assert (done.returncode, done.stdout.strip()) == (0, "12"), done.stderr


def test_every_dependency_is_pinned_and_nothing_local_is_in_the_lock() -> None:
    text = (ROOT / "requirements.lock").read_text()
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.!]+", pin) for pin in pins), (
        "plain name==version lines only"
    )
    names = {pin.split("==")[0] for pin in pins}
    assert len(names) == len(pins)
    project = settings()["project"]
    needed = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    for requirement in needed:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert name is not None
        assert re.sub(r"[-_.]+", "-", name[0]).lower() in names, requirement


def test_the_installed_set_satisfies_its_own_requirements() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
