"""What all tests share: one torch thread, no network, no tracking service, generated images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]

# Set before anything imports the libraries that read them; subprocesses inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TESTS = Path(__file__).parent
LONGEST = (
    "workflows/test_chain.py",
    "workflows/train/test_loop.py",
    "workflows/cluster/test_jobs.py",
    "workflows/pipeline/test_data_on_ray.py",
    "workflows/train/test_nodes.py",
    "workflows/systems/test_smoke_sizes.py",
    "workflows/systems/test_fourth_system.py",
    "workflows/train/tasks/test_tasks.py",
)
"""Started first: two workers then end at about the same time."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="leave out tests that start Ray or take long"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; with --quick leave out tests marked `ray` or `slow`, and those
    that use `ranks`.
    """
    assert all((TESTS / name).is_file() for name in LONGEST), "LONGEST names a file that was moved"
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(TESTS).as_posix(), len(rank)))
    if config.getoption("--quick"):
        left = [item for item in items if takes_long(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def takes_long(item: pytest.Item) -> bool:
    """Whether --quick leaves a test out: it starts Ray or processes that train, or is marked
    `slow`.
    """
    marked = item.get_closest_marker("ray") or item.get_closest_marker("slow")
    return marked is not None or "ranks" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def _no_ray_in_quick_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --quick whatever starts Ray in this process fails: the test lacks the mark `ray`.

    Of the session, so that it precedes the fixtures of modules; `ray.init` and `Cluster` both make
    a `Node`.
    """
    if not request.config.getoption("--quick"):
        yield
        return
    import ray._private.node

    def refuse(*args: object, **options: object) -> None:
        pytest.fail("starts Ray: mark this test with pytest.mark.ray")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray._private.node.Node, "__init__", refuse)
        yield


@pytest.fixture
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A folder of fsspec's in-memory store, emptied afterwards: an object store for tests."""
    import fsspec

    fs = fsspec.filesystem("memory")
    yield "memory://smalti-test"
    if fs.exists("/smalti-test"):
        fs.rm("/smalti-test", recursive=True)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet: on the local disk, and in an object store."""
    return (
        str(tmp_path / "place")
        if request.param == "local"
        else request.getfixturevalue("memory_url") + "/place"
    )


@pytest.fixture
def shapes() -> Callable[[int, int], np.ndarray]:
    """`shapes(seed, size)`: uint8 (size, size, 3), a coloured circle or square on a grey ground."""

    def draw(seed: int, size: int = 32) -> np.ndarray:
        rng = np.random.default_rng(seed)
        image = Image.new("RGB", (size, size), tuple(rng.integers(160, 240, 3).tolist()))
        left, top = (int(v) for v in rng.integers(0, size // 2, 2))
        side = int(rng.integers(size // 4, size // 2))
        form = ImageDraw.Draw(image).ellipse if seed % 2 else ImageDraw.Draw(image).rectangle
        form((left, top, left + side, top + side), fill=tuple(rng.integers(0, 140, 3).tolist()))
        return np.array(image)

    return draw
