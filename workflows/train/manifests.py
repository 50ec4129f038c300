"""Manifests of checkpoints: which checkpoint folders are complete, and what they hold.

Each worker writes its manifest last of all its files: a JSON file with their names, sizes and
checksums. A checkpoint is complete when the manifests of all workers exist and every file they name
has its size. Others are incomplete (interrupted while written), and are skipped.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

from smalti import storage
from smalti.errors import DataError
from smalti.workflows.pipeline.retry import chain_of

STEP = re.compile(r"step-(\d{9})$")
CHUNK_BYTES = 1 << 24


class Manifest(TypedDict):
    """What a worker wrote of a checkpoint: sizes in bytes and CRC-32 by file name."""

    world_size: int
    score: float | None
    files: dict[str, int]
    crc32: NotRequired[dict[str, int]]


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A complete checkpoint.

    Attributes:
        step: steps done when it was written.
        path: its folder.
        files: names of its files, by worker.
        score: value of the metric `train.best` when it was written.
        checksums: CRC-32 by file name.
    """

    step: int
    path: str
    files: tuple[tuple[str, ...], ...]
    score: float | None
    checksums: Mapping[str, int] = field(default_factory=dict)


def step_folder(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:09d}"


def manifest_name(rank: int) -> str:
    """Name of a worker's manifest."""
    return f"manifest-{rank:05d}.json"


def step_folders(folder: str) -> list[str]:
    """Paths of the checkpoints in `folder`, complete or not, the oldest first."""
    names = storage.list_names(folder)
    return [storage.join(folder, name) for name in names if STEP.search(name)]


def newest_complete(
    folder: str, say: Callable[[str], None], damaged: Sequence[str] = ()
) -> CompleteCheckpoint | None:
    """The newest complete checkpoint in `folder`.

    Args:
        folder: where the checkpoints of a run are.
        say: gets a line for each newer checkpoint that is incomplete.
        damaged: paths of checkpoints to leave out.
    """
    for path in reversed(step_folders(folder)):
        if path in damaged:
            continue
        found = inspect_checkpoint(path)
        if isinstance(found, CompleteCheckpoint):
            return found
        say(f"skipping the incomplete checkpoint {path}: {found}")
    return None


def inspect_checkpoint(path: str) -> CompleteCheckpoint | str:
    """The checkpoint in the folder `path`, or what is wrong with it."""
    sizes = storage.sizes_bytes(path)
    manifests = _read_manifests(path, sizes)
    if isinstance(manifests, str):
        return manifests
    for manifest in manifests:
        for name, size in manifest["files"].items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != size:
                return f"{name} has {sizes[name]:,} of {size:,} bytes"
    found = STEP.search(path)
    assert found is not None
    files = tuple(tuple(manifest["files"]) for manifest in manifests)
    checksums: dict[str, int] = {}
    for manifest in manifests:
        checksums |= manifest.get("crc32", {})
    return CompleteCheckpoint(int(found[1]), path, files, manifests[0]["score"], checksums)


def _read_manifests(path: str, sizes: Mapping[str, int]) -> list[Manifest] | str:
    """Manifests of all workers, or what is wrong with one."""
    manifests: list[Manifest] = []
    while not manifests or len(manifests) < manifests[0]["world_size"]:
        name = manifest_name(len(manifests))
        missing = f"{name} is missing"
        if name not in sizes:
            return missing
        try:
            manifest = read_manifest(storage.join(path, name))
        except DataError as error:
            if any(isinstance(cause, FileNotFoundError) for cause in chain_of(error)):
                return missing  # removed after the listing
            raise
        if manifest is None:
            return f"{name} is damaged"
        manifests.append(manifest)
    return manifests


def read_manifest(path: str) -> Manifest | None:
    """A worker's manifest; None where its content is damaged.

    Raises:
        DataError: storage does not answer, so nothing is known of the content.
    """
    try:
        found = json.loads(storage.read_bytes(path))
    except ValueError:
        return None
    kinds = {"world_size": int, "score": float | int | None, "files": dict}
    valid = isinstance(found, dict) and all(
        name in found and isinstance(found[name], kind) for name, kind in kinds.items()
    )
    return found if valid and found["world_size"] > 0 else None


def checksum(path: str) -> int:
    """CRC-32 of a local file."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            total = zlib.crc32(chunk, total)
    return total
