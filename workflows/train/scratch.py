"""Temporary folders on a node's own disk, removed with their process.

A folder is locked for as long as its process runs, in whatever container that is. A folder that a
killed process left is not locked, and the next worker on that node removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from smalti.workflows.train.collectives import Collectives

PREFIX = "smalti-scratch-"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def disk_is_full(error: BaseException) -> bool:
    """Whether a file could not be written because the disk takes no more."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    # torch's file writer raises its own error.
    return isinstance(error, RuntimeError) and "inline_container" in str(error)


class Scratch:
    """A new folder `path`, with `kind` in its name, until `remove()`."""

    def __init__(self, kind: str) -> None:
        self.path = ""
        self._lock = -1
        while not os.path.isdir(self.path):  # another process may remove it before it is locked
            self.path = tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-")
            with suppress(OSError):  # a file system without locks: `sweep` removes nothing there
                self._lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove the folder and its content."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep() -> None:
    """Remove folders that killed processes left, except those of other users."""
    place = tempfile.gettempdir()
    for name in os.listdir(place):
        if name.startswith(PREFIX):
            with suppress(OSError):
                _remove_unheld(os.path.join(place, name))


def _remove_unheld(path: str) -> None:
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def shared_folder(
    kind: str, fill: Callable[[str], None], collectives: Collectives
) -> Iterator[str]:
    """A folder that is filled once per node; every worker calls it.

    Args:
        kind: part of the folder's name.
        fill: called with the folder's path on the first worker of each node.
        collectives: of the workers.

    Yields:
        The path of this node's folder.
    """
    created: list[Scratch] = []

    def create() -> str:
        created.append(Scratch(kind))
        fill(created[0].path)
        return created[0].path

    try:
        yield collectives.once_per_node(create)
        collectives.storage_barrier()
    finally:
        for scratch in created:
            scratch.remove()
