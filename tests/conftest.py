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

LONGEST = ("test_chain.py", "test_train_tasks.py", "test_data_on_ray.py", "test_train_loop.py", "test_jobs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: two workers then end at about the same time."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Results that do not depend on the machine's cores, and workers that do not fight for them."""
    import torch

    torch.set_num_threads(1)


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
    return str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("memory_url") + "/place"


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
