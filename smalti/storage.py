"""Files and folders on local paths and fsspec URLs (`s3://…`, `gs://…`, `memory://…`).

Writes are atomic: locally a temporary name in the same folder, fsync and rename; on an object store
one PUT. Failures are raised as `DataError`, which says what failed, where, and how to fix it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from smalti.errors import DataError
from smalti.filesystems import FIXES, explained, files_below, remote
from smalti.paths import TEMP_SUFFIX, is_local, local_path, temp_name
from smalti.paths import absolute as absolute
from smalti.paths import is_temporary as is_temporary
from smalti.paths import join as join
from smalti.paths import parent as parent

CHANGE_TAGS = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "created")


def exists(path: str) -> bool:
    """True when a file or a folder exists at `path`."""
    if is_local(path):
        return os.path.exists(local_path(path))
    with explained("read", path):
        fs, key = remote(path)
        return bool(fs.exists(key))


def is_dir(path: str) -> bool:
    """Whether a folder exists at `path`; in an object store, a name below it."""
    if is_local(path):
        return os.path.isdir(local_path(path))
    with explained("read", path):
        fs, key = remote(path)
        return bool(fs.isdir(key))


def list_names(directory: str, suffix: str = "") -> list[str]:
    """Sorted names in `directory` that end with `suffix`.

    Temporary names are left out. A folder that does not exist has none.
    """
    with explained("list", directory):
        if is_local(directory):
            try:
                names = os.listdir(local_path(directory) or ".")
            except FileNotFoundError:
                return []
        else:
            fs, key = remote(directory)
            if not fs.isdir(key):
                return []
            names = [posixpath.basename(name.rstrip("/")) for name in fs.ls(key, detail=False)]
            names = (
                [name for name in names if name and name != posixpath.basename(key.rstrip("/"))]
                if names
                else []
            )
    return sorted(
        {name for name in names if name.endswith(suffix) and not name.endswith(TEMP_SUFFIX)}
    )


def make_dirs(path: str) -> None:
    """Create the folder `path` and its parents; object stores need none."""
    with explained("create the folder", path):
        if is_local(path):
            os.makedirs(local_path(path) or ".", exist_ok=True)
        else:
            fs, key = remote(path)
            fs.makedirs(key, exist_ok=True)


def remove(path: str) -> None:
    """Remove a file or a whole folder, if it exists."""
    with explained("remove", path):
        if is_local(path):
            local = local_path(path)
            if os.path.isdir(local) and not os.path.islink(local):
                shutil.rmtree(local)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(local)
            return
        fs, key = remote(path)
        if fs.exists(key):
            fs.rm(key, recursive=True)


def remove_temporary(directory: str) -> int:
    """Remove temporary files of interrupted writes from a local folder.

    Returns:
        The number of files and folders removed; 0 on an object store, whose writes leave none.
    """
    found = 0
    if is_local(directory):
        with explained("clear", directory):
            for folder, folders, names in os.walk(local_path(directory)):
                for name in [*folders, *names]:
                    if name.endswith(TEMP_SUFFIX):
                        remove(os.path.join(folder, name))
                        found += 1
                folders[:] = [name for name in folders if not name.endswith(TEMP_SUFFIX)]
    return found


def size_bytes(path: str) -> int:
    """Size of one file in bytes."""
    with explained("read", path):
        if is_local(path):
            return os.path.getsize(local_path(path))
        fs, key = remote(path)
        return int(fs.size(key))


def stamp(path: str) -> str:
    """A text that changes when the file does: its size, with its tag or time."""
    with explained("read", path):
        if is_local(path):
            found = os.stat(local_path(path))
            return f"{found.st_size} {found.st_mtime_ns}"
        fs, key = remote(path)
        info = fs.info(key)
        known = [info["size"], *(info.get(name) for name in CHANGE_TAGS)]
        return " ".join(str(value) for value in known if value is not None)


def sizes_bytes(directory: str) -> dict[str, int]:
    """Size in bytes of every file below `directory`, by relative path.

    Temporary files are left out.
    """
    with explained("list", directory):
        if is_local(directory):
            root = local_path(directory)
            files = [os.path.join(top, name) for top, _, names in os.walk(root) for name in names]
            found = {
                os.path.relpath(file, root).replace(os.sep, "/"): os.path.getsize(file)
                for file in files
            }
        else:
            fs, key = remote(directory)
            below = files_below(fs, key).items()
            found = {name: int(str(info["size"])) for name, (_, info) in below}
    return {name: size for name, size in found.items() if not name.endswith(TEMP_SUFFIX)}


def read_bytes(path: str) -> bytes:
    """All bytes of a file; `DataError` if it does not exist."""
    with explained("read", path):
        if is_local(path):
            return Path(local_path(path)).read_bytes()
        fs, key = remote(path)
        return bytes(fs.cat_file(key))


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start`, fewer at its end; no others are fetched."""
    if not size:
        return b""
    with explained("read", path):
        if is_local(path):
            with open(local_path(path), "rb") as file:
                file.seek(start)
                return file.read(size)
        fs, key = remote(path)
        return bytes(fs.cat_file(key, start=start, end=start + size))


def open_read(path: str) -> IO[bytes]:
    """Open a file for reading: binary and seekable."""
    with explained("read", path):
        if is_local(path):
            return open(local_path(path), "rb")
        fs, key = remote(path)
        return fs.open(key, "rb")


def write_atomic(path: str, data: bytes | bytearray | memoryview) -> None:
    """Write a file atomically: readers see all of `data` or the old file. Creates folders."""
    with explained("write", path):
        if not is_local(path):
            fs, key = remote(path)
            folder = posixpath.dirname(key)
            if folder:
                fs.makedirs(folder, exist_ok=True)
            fs.pipe_file(key, bytes(data))
            return
        with atomic_file(path) as temp, open(temp, "wb") as file:
            file.write(data)


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[str]:
    """A local file to write, which replaces `path` when the block succeeds.

    Atomic as `write_atomic`, for data too large for memory: to a URL it is uploaded in parts from
    the local disk.
    """
    with explained("write", path), contextlib.ExitStack() as stack:
        if is_local(path):
            local = local_path(path)
            os.makedirs(os.path.dirname(local) or ".", exist_ok=True)
            temp = temp_name(local)
        else:
            temp = os.path.join(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="smalti-")), "file"
            )
        try:
            yield temp
            if is_local(path):
                with open(temp, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temp, local)
            else:
                fs, key = remote(path)
                fs.makedirs(posixpath.dirname(key), exist_ok=True)
                fs.put_file(temp, key)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temp)
            raise


def put_file(local: str, path: str) -> None:
    """Move or copy the file `local`, which may then be gone, to `path`, atomically."""
    with explained("write", path):
        if not is_local(path):
            fs, key = remote(path)
            fs.makedirs(posixpath.dirname(key), exist_ok=True)
            fs.put_file(local, key)
            return
        target = local_path(path)
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        with open(local, "rb") as file:
            os.fsync(file.fileno())
        if os.stat(local).st_dev == os.stat(os.path.dirname(target) or ".").st_dev:
            os.replace(local, target)
            return
    with atomic_file(path) as temp:
        shutil.copyfile(local, temp)


def get_file(path: str, local: str) -> None:
    """Copy the file `path` to the local file `local`; an interrupted copy may remain.

    Raises:
        DataError: if there is no file at `path`.
    """
    with explained("read", path):
        if is_local(path):
            shutil.copyfile(local_path(path), local)
        else:
            fs, key = remote(path)
            fs.get_file(key, local)


@contextlib.contextmanager
def atomic_local_dir(path: str) -> Iterator[str]:
    """A local folder to fill, which replaces the folder `path` when the block succeeds.

    Locally it is renamed, so readers never see part of it. To a URL it is uploaded file by file:
    where readers must not see part of it, write a marker last, as artifacts do.
    """
    if is_local(path):
        local = local_path(path).rstrip("/")
        with explained("create the folder", path):
            temp = temp_name(local)
            os.makedirs(temp)
        try:
            yield temp
            with explained("write", path):
                _swap_in(temp, local)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="smalti-") as temp:
        yield temp
        with explained("write", path):
            fs, key = remote(path)
            if fs.exists(key):
                fs.rm(key, recursive=True)
            for file in sorted(p for p in Path(temp).rglob("*") if p.is_file()):
                target = posixpath.join(key, file.relative_to(temp).as_posix())
                fs.makedirs(posixpath.dirname(target), exist_ok=True)
                fs.put_file(str(file), target)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path with the content of `path`; a copy only if `path` is a URL."""
    if is_local(path):
        if not exists(path):
            raise DataError(f"cannot read {path}: {FIXES[errno.ENOENT]}")
        yield local_path(path)
        return
    with tempfile.TemporaryDirectory(prefix="smalti-") as temp:
        target = os.path.join(temp, posixpath.basename(path.rstrip("/")) or "copy")
        with explained("read", path):
            fs, key = remote(path)
            if not fs.isdir(key):
                fs.get_file(key, target)
            else:
                for name, (whole, _) in files_below(fs, key).items():
                    part = os.path.join(target, name)
                    os.makedirs(os.path.dirname(part), exist_ok=True)
                    fs.get_file(whole, part)
        yield target


def read_json(path: str) -> Any:
    """The JSON value in a file; `DataError` if it is damaged."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise DataError(
            f"{path} is not valid JSON ({error}): it is damaged, or not a file of smalti; remove "
            "it and run again"
        ) from error


def write_json(path: str, value: object) -> None:
    """Write a JSON value, indented, atomically; `ValueError` for NaN, which is not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def _swap_in(temp: str, local: str) -> None:
    """Rename the folder `temp` to `local`, replacing an existing one."""
    if not os.path.lexists(local):
        os.rename(temp, local)
        return
    old = temp_name(local)
    os.rename(local, old)
    os.rename(temp, local)
    remove(old)
