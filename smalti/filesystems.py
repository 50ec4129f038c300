"""File systems of URLs, and the errors of file systems in words."""

from __future__ import annotations

import contextlib
import errno
import posixpath
from collections.abc import Iterator

import fsspec
from fsspec.core import url_to_fs

from smalti.errors import DataError
from smalti.paths import is_local

FIXES = {
    errno.ENOSPC: "the disk is full: free some space, or set another `out`",
    errno.EDQUOT: "the disk quota is used up: free some space, or set another `out`",
    errno.EACCES: "permission denied for this user: set another `out`, or fix the permissions",
    errno.EPERM: "permission denied for this user: set another `out`, or fix the permissions",
    errno.EROFS: "that file system is read-only: set another `out`",
    errno.ENOTDIR: "a file is where a folder is needed: move it, or set another path",
    errno.EEXIST: "a file is where a folder is needed: move it, or set another path",
    errno.EISDIR: "a folder is where a file is needed: move it, or set another path",
    errno.ENOENT: "nothing exists at that path: check its spelling",
    errno.EFBIG: "files of that size are not allowed there: raise `ulimit -f`, or set another `out`",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
}


@contextlib.contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Raise errors of the operating system or of a store's client as `DataError`.

    Args:
        action: what is done, as in "cannot ACTION PATH".
        path: the path or URL that it is done to.

    Raises:
        DataError: with the reason, and how to fix it.
    """
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        fix = FIXES.get(_code(error), "check the path and the device")
        reason = error.strerror or error or type(error).__name__
        raise DataError(f"cannot {action} {path}: {fix} ({reason})") from error
    except Exception as error:
        if is_local(path):
            raise
        text = (
            f"cannot {action} {path}: {type(error).__name__}: {error}. Check the URL, the "
            "credentials and the network"
        )
        raise DataError(text) from error


def _code(error: OSError) -> int:
    """The errno of an error, or one that fits its class."""
    if error.errno is not None:
        return error.errno
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    return errno.EACCES if isinstance(error, PermissionError) else -1


def remote(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL without cached listings, and the key in it."""
    try:
        fs, key = url_to_fs(path)
    except (ImportError, ValueError) as error:
        scheme = path.partition("://")[0]
        raise DataError(
            f"cannot reach {path}: {error}. Install the fsspec package for `{scheme}://`, or use "
            "another path"
        ) from error
    fs.invalidate_cache()  # another process may have written
    return fs, key


def files_below(
    fs: fsspec.AbstractFileSystem, key: str
) -> dict[str, tuple[str, dict[str, object]]]:
    """(full name, info) of every file below a folder, by relative path.

    Names that end with a slash are left out: some programs, such as Ray Train on S3, write empty
    objects for folders.
    """
    root = fs._strip_protocol(key)
    found = fs.find(key, detail=True)
    return {
        posixpath.relpath(name, root): (name, info)
        for name, info in found.items()
        if not name.endswith("/")
    }
