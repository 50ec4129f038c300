"""Targets that cannot be written: one clear error, and nothing half-written counts as done."""

from __future__ import annotations

import io
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from smalti import shards
from smalti.artifact import Artifact
from smalti.errors import DataError
from smalti.schema import Recipe
from smalti.workflows.corpus import stage as corpus


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this machine lets one be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def recipe(out: Path, source: Path) -> Recipe:
    section = {"source": str(source), "val_fraction": 0.0, "shard_images": 10}
    return Recipe.model_validate({"out": str(out), "tracking": {"uri": "off"}, "corpus": section})


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "PNG")
        (folder / f"{number:03d}.png").write_bytes(stream.getvalue())


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_when_there_is_room(
    inline: None, tmp_path: Path, small_disk: Path
) -> None:
    write_pictures(tmp_path / "in", 120)  # about 1.5 MB
    wanted = recipe(small_disk / "out", tmp_path / "in")
    with pytest.raises(DataError, match="the disk is full: free some space, or set another `out`"):
        corpus.run(wanted)
    place = small_disk / "out" / "corpus"
    assert Artifact.find(str(place)) is None
    assert not [path for path in place.rglob("*") if path.name.endswith("smalti-tmp")], (
        "no half of a file is left"
    )
    written = shards.list_shards(str(place))
    assert 0 < len(written) < 12
    assert all(len(shards.read_shard(str(place), key)) == 10 for key in written)
    shutil.copytree(small_disk / "out", tmp_path / "more")  # a disk with more room
    assert corpus.run(recipe(tmp_path / "more", tmp_path / "in")).counts["images"] == 120


def test_a_shard_that_may_not_be_so_large_is_not_there(tmp_path: Path) -> None:
    table = pa.table({"image": [bytes(100_000)] * 5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*00000\.parquet: .*ulimit -f"):
            shards.write_shard(str(tmp_path), "train/00000", table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "train").iterdir()) == []


def test_an_unwritable_target_is_told(inline: None, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="a file is where a folder is needed"):
        corpus.run(recipe(tmp_path / "file", tmp_path / "in"))
    with pytest.raises(DataError, match="cannot create the folder /proc/smalti"):
        corpus.run(recipe(Path("/proc/smalti"), tmp_path / "in"))
