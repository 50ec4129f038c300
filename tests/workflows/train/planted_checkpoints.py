"""Checkpoint folders with planted files, for tests of what is complete and what is kept."""

from __future__ import annotations

from smalti import storage
from smalti.workflows.train.manifests import manifest_name, step_folder


def plant(place: str, step: int, *, score: float | None = None, world_size: int = 2) -> str:
    """A whole checkpoint of two workers."""
    path = storage.join(place, step_folder(step))
    for rank in range(world_size):
        names = [f"model/engine/rank{rank}.pt"] + (["task.pt"] if rank == 0 else [])
        for name in names:
            storage.write_atomic(storage.join(path, name), f"{name} of {step}".encode())
        sizes = {name: len(f"{name} of {step}") for name in names}
        manifest = {"world_size": world_size, "score": score, "files": sizes}
        storage.write_json(storage.join(path, manifest_name(rank)), manifest)
    return path
