"""Reading over a network: what a store or a server does not answer is asked again, and then one clear error.

A file system's own answer (there is no such file, it may not be read) comes as an OSError of that kind, at once. All else
that the client of a store raises, of whatever type, comes as `UnreachedError` after the last try. Local disks are asked once.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from smalti.errors import DataError

PAUSES_S = (1.0, 4.0, 10.0)  # before each further try
BUFFER_BYTES = 1 << 16
ANSWERS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
MISUSE = (ValueError, TypeError, AttributeError, NotImplementedError)  # of a client: it would be the same again
LATER = frozenset([408, 425, 429])  # of HTTP's 4xx, those that a later try may not meet
T = TypeVar("T")


class UnreachedError(DataError):
    """A store or a server that does not answer, time after time."""


def unreadable(source: str, error: Exception) -> DataError:
    """The error of a source that the system does not let be read."""
    return DataError(f"corpus.source: {source} cannot be read ({_told(error)}). Check its permissions and the device.")


@contextmanager
def reading(source: str) -> Iterator[None]:
    """What a file system raises in the block becomes one DataError that names the source."""
    try:
        yield
    except OSError as error:
        raise unreadable(source, error) from error


def patiently(place: str, call: Callable[..., T], *args: Any, pauses: Sequence[float] | None = None, **more: Any) -> T:
    """What `call(*args, **more)` of a place on a network gives; up to `len(pauses)` further tries (default: `PAUSES_S`).

    Errors: OSError of `ANSWERS`, at once; UnreachedError, which names `place`, when no try is answered.
    """
    waits = iter(PAUSES_S if pauses is None else pauses)
    while True:
        try:
            return call(*args, **more)
        except (*MISUSE, DataError, MemoryError):
            raise
        except Exception as error:
            if _is_answer(error):
                if isinstance(error, ANSWERS):
                    raise
                raise PermissionError(_told(error)) from error
            wait_s = next(waits, None)
            if wait_s is None:
                raise UnreachedError(
                    f"{place} cannot be read: it does not answer ({_told(error)}). Check the network and the server, and "
                    "run the command again: what is done is kept."
                ) from error
        time.sleep(wait_s)


def _is_answer(error: Exception) -> bool:
    """Whether an error tells what is at a place, and not that nobody answers. fsspec's HTTP calls a file missing
    whatever it met: there the cause counts."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    for one in (error, cause):
        status = getattr(one, "status", None)  # aiohttp's
        if isinstance(status, int):
            return 400 <= status < 500 and status not in LATER
    if cause is not None and not isinstance(cause, MISUSE) and type(cause).__module__.startswith("aiohttp"):
        return False
    return isinstance(error, ANSWERS) and not isinstance(cause, TimeoutError | ConnectionError)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


class PatientFiles:
    """A file system of fsspec whose every call is tried again, as `patiently` does."""

    def __init__(self, fs: Any, place: str, pauses: Sequence[float] | None = None) -> None:
        self._fs, self._place, self._pauses = fs, place, pauses

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        return functools.partial(patiently, self._place, found, pauses=self._pauses) if callable(found) else found

    def exists(self, path: str) -> bool:
        """Whether something is there; fsspec's own `exists` and `isdir` are False for whatever happens."""
        try:
            self.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def isdir(self, path: str) -> bool:
        """Whether a folder is there; of a web address, whether its page has links."""
        if path.startswith(("http://", "https://")):
            return bool(patiently(self._place, self._fs.isdir, path, pauses=self._pauses))
        try:
            return bool(self.info(path)["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return False


class PatientStream(io.RawIOBase):
    """A seekable stream of a network; each read is tried again from where it began."""

    def __init__(self, stream: Any, place: str) -> None:
        self.stream, self.place = stream, place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self.stream.tell())

    def readinto(self, buffer: Any) -> int:
        start = self.stream.tell()

        def read() -> bytes:
            self.stream.seek(start)
            return bytes(self.stream.read(len(buffer)))

        data = patiently(self.place, read)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()
