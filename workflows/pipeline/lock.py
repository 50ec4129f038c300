"""One run at a time per artifact folder.

Two runs that write the same artifact would count and remove each other's files.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from smalti import storage
from smalti.errors import ArtifactError, DataError
from smalti.progress import log


def lock_path(path: str) -> str:
    """The lock of an artifact's folder: `.<name>.lock` beside it."""
    folder, _, name = storage.local_path(path).rstrip("/").rpartition("/")
    return f"{folder}/.{name}.lock"


@contextmanager
def holding(path: str) -> Iterator[None]:
    """Lock the folder `path` against other runs.

    The operating system releases the lock when the process ends, also after a crash. Object stores
    have no locks: there this does nothing.

    Raises:
        ArtifactError: if another run holds the lock.
    """
    if not storage.is_local(path):
        yield
        return
    name = lock_path(path)
    storage.make_dirs(os.path.dirname(name))
    file = _take(name, path)
    try:
        yield
    finally:
        with suppress(OSError):
            os.remove(name)
        os.close(file)


def _take(name: str, path: str) -> int:
    """The locked file; opened again if another run removed it meanwhile."""
    while True:
        try:
            file = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DataError(
                f"cannot write {name}: {error.strerror}. Set another `out`, or fix its permissions"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 1000).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise ArtifactError(
                f"Another run is writing {path} (its process: {holder}). Wait for it, stop it, or "
                "set another `out`."
            ) from error
        except OSError as error:
            log(
                f"{path} cannot be locked on this file system ({error.strerror}): do not start a "
                "second run there"
            )
            return file
        with suppress(FileNotFoundError):
            if os.fstat(file).st_ino == os.stat(name).st_ino:
                os.truncate(file, 0)
                os.write(
                    file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
                )
                return file
        os.close(file)
