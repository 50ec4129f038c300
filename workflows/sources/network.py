"""Reading over a network: retries, then one clear error.

An answer of a file system (a missing file, a permission) is an OSError of that kind, raised at
once. Anything else that the client of a store raises becomes `UnreachedError` after the last try.
Local disks are read without retries.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from fsspec import AbstractFileSystem

from smalti.errors import DataError
from smalti.workflows.pipeline.retry import ANSWERS, brief, refused, retry

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PAUSES_S = (1.0, 4.0, 10.0)  # before each further try
BUFFER_BYTES = 1 << 16
# of a client: a retry would fail too
MISUSE = (
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
)
T = TypeVar("T")


class UnreachedError(DataError):
    """A store or server that answered no try."""


def unreadable(source: str, error: Exception) -> DataError:
    """The error of a source that the operating system does not read."""
    return DataError(
        f"corpus.source: {source} cannot be read ({brief(error)}). Check its permissions and the "
        "device."
    )


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn what a file system raises into one DataError that names the source."""
    try:
        yield
    except OSError as error:
        raise unreadable(source, error) from error


def retry_network(
    place: str,
    call: Callable[..., T],
    *args: object,
    pauses: Sequence[float] | None = None,
    **more: object,
) -> T:
    """What `call(*args, **more)` returns, retried while `place` does not answer.

    Args:
        pauses: seconds before each further try; default: `PAUSES_S`.

    Raises:
        OSError: one of `ANSWERS`, at once.
        UnreachedError: if no try was answered.
    """
    try:
        return retry(
            functools.partial(call, *args, **more),
            what=f"reading {place}",
            transient=_may_pass,
            pauses_s=PAUSES_S if pauses is None else pauses,
        )
    except (*MISUSE, DataError, MemoryError):
        raise
    except Exception as error:
        if not _is_answer(error):
            raise UnreachedError(
                f"{place} cannot be read: it does not answer ({brief(error)}). Check the network "
                "and the server, and run the same command to resume."
            ) from error
        if isinstance(error, ANSWERS):
            raise
        raise PermissionError(brief(error)) from error


def _may_pass(error: Exception) -> bool:
    """Whether a later try may go well: nobody answered, and the call itself was right."""
    return not isinstance(error, (*MISUSE, DataError, MemoryError)) and not _is_answer(error)


def _is_answer(error: Exception) -> bool:
    """Whether an error is an answer of the server.

    fsspec raises FileNotFoundError for any error of HTTP: there the cause counts.
    """
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    for one in (error, cause):
        permanent = refused(one)
        if permanent is not None:
            return permanent
    if (
        cause is not None
        and not isinstance(cause, MISUSE)
        and type(cause).__module__.startswith("aiohttp")
    ):
        return False
    return isinstance(error, ANSWERS) and not isinstance(cause, TimeoutError | ConnectionError)


class RetryingFiles:
    """A file system of fsspec whose calls are retried (`retry_network`)."""

    def __init__(
        self, fs: AbstractFileSystem, place: str, pauses: Sequence[float] | None = None
    ) -> None:
        self._fs = fs
        self._place = place
        self._pauses = pauses

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        return (
            functools.partial(retry_network, self._place, found, pauses=self._pauses)
            if callable(found)
            else found
        )

    def exists(self, path: str) -> bool:
        """Whether something is there; fsspec's own `exists` and `isdir` are False for whatever
        happens.
        """
        try:
            self.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def isdir(self, path: str) -> bool:
        """Whether a folder is there; of a web address, whether its page has links."""
        if path.startswith(("http://", "https://")):
            return bool(retry_network(self._place, self._fs.isdir, path, pauses=self._pauses))
        try:
            return bool(self.info(path)["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return False


Files = AbstractFileSystem | RetryingFiles


class RetryingStream(io.RawIOBase):
    """A seekable stream over a network whose reads are retried."""

    def __init__(self, stream: BinaryIO, place: str) -> None:
        self.stream = stream
        self.place = place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self.stream.tell())

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        start = self.stream.tell()

        def read() -> bytes:
            self.stream.seek(start)
            return bytes(self.stream.read(len(view)))

        data = retry_network(self.place, read)
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()
