"""Folders on a machine's own disk that hold files for a while, and go with the process that made
them.

A folder is locked as long as its process lives, in whatever container that is. One that a killed
process left is not, and the next worker of that machine sweeps it away.
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
    """Whether the disk is why a file could not be written; torch's writer of files says it in its
    own way.
    """
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return isinstance(error, RuntimeError) and "inline_container" in str(error)


class Scratch:
    """A new folder `path`, with `kind` in its name, until `remove()`."""

    def __init__(self, kind: str) -> None:
        self.path, self._lock = "", -1
        while not os.path.isdir(self.path):  # a sweep may come between making and locking
            self.path = tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-")
            with suppress(OSError):  # a file system without locks: nothing is swept there either
                self._lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove the folder with all that it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep() -> None:
    """Remove what processes left that were killed; what another user's left stays."""
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
    """A folder that `fill(folder)` filled, once a machine, for all workers of that machine; each of
    them calls it alike.
    """
    made: list[Scratch] = []

    def make() -> str:
        made.append(Scratch(kind))
        fill(made[0].path)
        return made[0].path

    try:
        yield collectives.once_a_machine(make)
        collectives.storage_barrier()
    finally:
        for scratch in made:
            scratch.remove()
