"""Retries of calls to storage, a network or a server.

Only transient errors are retried; each failed try is logged. A permanent error (a missing file, a
permission, a full disk, damaged content) is raised at once.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from smalti.errors import DataError
from smalti.progress import log

STORAGE_PAUSES_S = (2.0, 4.0, 8.0, 16.0, 32.0)
"""Pauses before each further try of the storage of a training run: about a minute in all."""
PERMANENT = frozenset(
    [errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT,
     errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG]
)  # fmt: skip
"""Errors of a file system that a later try meets too."""

ANSWERS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
"""The same of clients of object stores, which set no errno."""

LATER = frozenset([408, 425, 429])
"""Statuses of HTTP's 4xx that may pass."""
DENIED = ("ACCESS_DENIED", "AccessDenied")
"""What clients of object stores write into an error without errno when a permission is missing."""

T = TypeVar("T")


def retry(
    call: Callable[..., T],
    *args: object,
    what: str,
    transient: Callable[[Exception], bool],
    pauses_s: Sequence[float],
    say: Callable[[str], None] = log,
    **more: object,
) -> T:
    """Return `call(*args, **more)`, tried once more than there are pauses.

    Args:
        what: what is tried, for log lines: `reading s3://bucket/x`.
        transient: whether an error may pass; others are raised at once.
        pauses_s: seconds before each further try.
        say: where each failed try is logged.

    Raises:
        Exception: the last error of `call`.
    """
    for number, pause_s in enumerate(pauses_s, 1):
        try:
            return call(*args, **more)
        except Exception as error:
            if not transient(error):
                raise
            say(
                f"{what} failed (try {number} of {len(pauses_s) + 1}), retrying in {pause_s:g} s: "
                f"{brief(error)}"
            )
        time.sleep(pause_s)
    return call(*args, **more)


def retry_storage(call: Callable[..., T], *args: object, say: Callable[[str], None] = log) -> T:
    """Call a function of `smalti.storage`, retried for about a minute.

    Raises:
        DataError: of the last try.
    """
    what = f"{getattr(call, '__name__', 'storage')} {next((arg for arg in args if isinstance(arg, str)), '')}".strip()
    return retry(call, *args, what=what, transient=is_transient, pauses_s=STORAGE_PAUSES_S, say=say)


def is_transient(error: Exception) -> bool:
    """Whether an error of `smalti.storage` may pass: a DataError with such a cause."""
    if not isinstance(error, DataError):
        return False
    causes = [cause for cause in chain_of(error) if cause is not error]
    if not causes:
        return False  # a check of ours on the data
    return not any(_is_permanent(cause) for cause in causes)


def _is_permanent(cause: BaseException) -> bool:
    """Whether a further try would raise the same error."""
    if isinstance(cause, (*ANSWERS, ValueError, TypeError, KeyError, AttributeError)) or refused(
        cause
    ):
        return True
    if not isinstance(cause, OSError):
        return False
    denied = cause.errno is None and any(word in str(cause) for word in DENIED)
    return denied or cause.errno in PERMANENT


def refused(error: BaseException | None) -> bool | None:
    """Whether the HTTP status of an error is permanent: 4xx except `LATER`.

    None without a status.
    """
    status = getattr(error, "status", None)  # aiohttp's
    return 400 <= status < 500 and status not in LATER if isinstance(status, int) else None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def brief(error: BaseException) -> str:
    """The first line of an error, or the name of its type."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
