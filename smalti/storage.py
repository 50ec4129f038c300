"""Files and folders on local paths and any fsspec URL (`s3://…`, `gs://…`, `memory://…`), by one set of functions.

A write is whole or absent: locally a temporary name in the same folder, fsync and rename; on an object store one PUT.
Failures come as `DataError`: what, where, and the mend.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from smalti.errors import DataError

_TEMP_SUFFIX = ".smalti-tmp"
_MENDS = {
    errno.ENOSPC: "the disk is full: free some space, or set another `out`",
    errno.EDQUOT: "the disk quota is used up: free some space, or set another `out`",
    errno.EACCES: "this user may not do that there: set another `out`, or mend the permissions",
    errno.EPERM: "this user may not do that there: set another `out`, or mend the permissions",
    errno.EROFS: "that file system is read-only: set another `out`",
    errno.ENOTDIR: "a file stands where a folder is needed: move it, or set another path",
    errno.EEXIST: "a file stands where a folder is needed: move it, or set another path",
    errno.EISDIR: "a folder stands where a file is needed: move it, or set another path",
    errno.ENOENT: "there is nothing at that path: check its spelling",
    errno.EFBIG: "files of that size are not allowed there: raise `ulimit -f`, or set another `out`",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
}


def is_local(path: str) -> bool:
    """True for a plain path and for `file://…`."""
    return "://" not in path or path.startswith(("file://", "local://"))


def local_path(path: str) -> str:
    """A local path without its `file://`, and with `~` expanded."""
    for scheme in ("file://", "local://"):
        path = path.removeprefix(scheme)
    return os.path.expanduser(path)


def is_temporary(name: str) -> bool:
    """True for the name of a file or folder that is being written, or was when its process was killed."""
    return name.endswith(_TEMP_SUFFIX)


def absolute(path: str) -> str:
    """`path` as seen from any process on this machine; a URL as it is."""
    return os.path.abspath(local_path(path)) if is_local(path) else path


def join(root: str, *parts: str) -> str:
    """`root/part/…`, for paths and URLs alike."""
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    if not root or not tail:
        return tail or root
    return root + tail if root.endswith("/") else f"{root}/{tail}"


def parent(path: str) -> str:
    """The folder that holds `path`; "" for a bare file name."""
    if is_local(path):
        return posixpath.dirname(local_path(path).rstrip("/"))
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{posixpath.dirname(rest.rstrip('/'))}"


def exists(path: str) -> bool:
    """True when a file or a folder stands at `path`."""
    if is_local(path):
        return os.path.exists(local_path(path))
    with _told("look at", path):
        fs, key = _remote(path)
        return bool(fs.exists(key))


def is_dir(path: str) -> bool:
    """True when a folder stands at `path` (on an object store: when a name begins with `path/`)."""
    if is_local(path):
        return os.path.isdir(local_path(path))
    with _told("look at", path):
        fs, key = _remote(path)
        return bool(fs.isdir(key))


def list_names(directory: str, suffix: str = "") -> list[str]:
    """Sorted names of the files and folders in `directory` that end with `suffix`; temporary ones are left out.

    A folder that does not exist holds nothing.
    """
    with _told("list", directory):
        if is_local(directory):
            try:
                names = os.listdir(local_path(directory) or ".")
            except FileNotFoundError:
                return []
        else:
            fs, key = _remote(directory)
            if not fs.isdir(key):
                return []
            names = [posixpath.basename(name.rstrip("/")) for name in fs.ls(key, detail=False)]
            names = [name for name in names if name and name != posixpath.basename(key.rstrip("/"))] if names else []
    return sorted({name for name in names if name.endswith(suffix) and not name.endswith(_TEMP_SUFFIX)})


def make_dirs(path: str) -> None:
    """Make the folder `path` and those above it; object stores have none to make."""
    with _told("make the folder", path):
        if is_local(path):
            os.makedirs(local_path(path) or ".", exist_ok=True)
        else:
            fs, key = _remote(path)
            fs.makedirs(key, exist_ok=True)


def remove(path: str) -> None:
    """Remove a file or a whole folder; nothing there is fine."""
    with _told("remove", path):
        if is_local(path):
            local = local_path(path)
            if os.path.isdir(local) and not os.path.islink(local):
                shutil.rmtree(local)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(local)
            return
        fs, key = _remote(path)
        if fs.exists(key):
            fs.rm(key, recursive=True)


def remove_temporary(directory: str) -> int:
    """Remove what writes that were killed left in a local folder and below; how many files. Object stores have none."""
    found = 0
    if is_local(directory):
        with _told("clear", directory):
            for folder, folders, names in os.walk(local_path(directory)):
                for name in [*folders, *names]:
                    if name.endswith(_TEMP_SUFFIX):
                        remove(os.path.join(folder, name))
                        found += 1
                folders[:] = [name for name in folders if not name.endswith(_TEMP_SUFFIX)]
    return found


def size_bytes(path: str) -> int:
    """Bytes of one file."""
    with _told("look at", path):
        if is_local(path):
            return os.path.getsize(local_path(path))
        fs, key = _remote(path)
        return int(fs.size(key))


def stamp(path: str) -> str:
    """A text that changes when the file at `path` does: its size with its tag or time, as its store tells them."""
    with _told("look at", path):
        if is_local(path):
            found = os.stat(local_path(path))
            return f"{found.st_size} {found.st_mtime_ns}"
        fs, key = _remote(path)
        info = fs.info(key)
        told = [info.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "created")]
        return " ".join(str(value) for value in [info["size"], *told] if value is not None)


def sizes_bytes(directory: str) -> dict[str, int]:
    """Bytes of each file in `directory` and the folders below, by its path from there; temporary ones are left out."""
    with _told("list", directory):
        if is_local(directory):
            root = local_path(directory)
            files = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
            found = {os.path.relpath(file, root).replace(os.sep, "/"): os.path.getsize(file) for file in files}
        else:
            fs, key = _remote(directory)
            found = {name: int(info["size"]) for name, (_, info) in _files_below(fs, key).items()}
    return {name: size for name, size in found.items() if not name.endswith(_TEMP_SUFFIX)}


def read_bytes(path: str) -> bytes:
    """All bytes of a file; `DataError` when there is none."""
    with _told("read", path):
        if is_local(path):
            return Path(local_path(path)).read_bytes()
        fs, key = _remote(path)
        return bytes(fs.cat_file(key))


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on, fewer where it ends; no others are fetched."""
    if not size:
        return b""
    with _told("read", path):
        if is_local(path):
            with open(local_path(path), "rb") as file:
                file.seek(start)
                return file.read(size)
        fs, key = _remote(path)
        return bytes(fs.cat_file(key, start=start, end=start + size))


def open_read(path: str) -> IO[bytes]:
    """A seekable binary file to read from."""
    with _told("read", path):
        if is_local(path):
            return open(local_path(path), "rb")
        fs, key = _remote(path)
        return fs.open(key, "rb")


def write_atomic(path: str, data: bytes | bytearray | memoryview) -> None:
    """Write `data` to `path` so that a reader sees all of it or what stood there before; folders are made."""
    with _told("write", path):
        if not is_local(path):
            fs, key = _remote(path)
            folder = posixpath.dirname(key)
            if folder:
                fs.makedirs(folder, exist_ok=True)
            fs.pipe_file(key, bytes(data))
            return
        with atomic_file(path) as temp, open(temp, "wb") as file:
            file.write(data)


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[str]:
    """A local file to write; when the block ends well it becomes the file `path`, as with `write_atomic`.

    For what is too large to hold twice: to a URL it is sent in parts from the local disk.
    """
    with _told("write", path), contextlib.ExitStack() as stack:
        if is_local(path):
            local = local_path(path)
            os.makedirs(os.path.dirname(local) or ".", exist_ok=True)
            temp = _temp_name(local)
        else:
            temp = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="smalti-")), "file")
        try:
            yield temp
            if is_local(path):
                with open(temp, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temp, local)
            else:
                fs, key = _remote(path)
                fs.makedirs(posixpath.dirname(key), exist_ok=True)
                fs.put_file(temp, key)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temp)
            raise


def put_file(local: str, path: str) -> None:
    """Bring the local file `local` to `path`, whole or not at all; it may be moved, and need not stand afterwards."""
    with _told("write", path):
        if not is_local(path):
            fs, key = _remote(path)
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
    """Copy the file `path` to the local name `local`; `DataError` when there is none. A copy cut short may stand there."""
    with _told("read", path):
        if is_local(path):
            shutil.copyfile(local_path(path), local)
        else:
            fs, key = _remote(path)
            fs.get_file(key, local)


@contextlib.contextmanager
def atomic_local_dir(path: str) -> Iterator[str]:
    """A local folder to fill; when the block ends well it becomes the folder `path`, replacing what stood there.

    Locally by rename (a reader never sees half of it). To a URL by upload, file by file: what must be whole there
    needs a marker written last, as artifacts have.
    """
    if is_local(path):
        local = local_path(path).rstrip("/")
        with _told("make the folder", path):
            temp = _temp_name(local)
            os.makedirs(temp)
        try:
            yield temp
            with _told("write", path):
                _swap_in(temp, local)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="smalti-") as temp:
        yield temp
        with _told("write", path):
            fs, key = _remote(path)
            if fs.exists(key):
                fs.rm(key, recursive=True)
            for file in sorted(p for p in Path(temp).rglob("*") if p.is_file()):
                target = posixpath.join(key, file.relative_to(temp).as_posix())
                fs.makedirs(posixpath.dirname(target), exist_ok=True)
                fs.put_file(str(file), target)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path with the content of the file or folder `path`; no copy when it is local already."""
    if is_local(path):
        if not exists(path):
            raise DataError(f"cannot read {path}: {_MENDS[errno.ENOENT]}")
        yield local_path(path)
        return
    with tempfile.TemporaryDirectory(prefix="smalti-") as temp:
        target = os.path.join(temp, posixpath.basename(path.rstrip("/")) or "copy")
        with _told("read", path):
            fs, key = _remote(path)
            if not fs.isdir(key):
                fs.get_file(key, target)
            else:
                for name, (whole, _) in _files_below(fs, key).items():
                    part = os.path.join(target, name)
                    os.makedirs(os.path.dirname(part), exist_ok=True)
                    fs.get_file(whole, part)
        yield target


def read_json(path: str) -> Any:
    """The JSON value in a file; `DataError` when it is torn."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise DataError(
            f"{path} does not hold whole JSON ({error}): it is torn or not ours; remove it and run again"
        ) from error


def write_json(path: str, value: Any) -> None:
    """Write a JSON value, indented, in one piece; NaN is refused (it is not JSON)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def buffer() -> io.BytesIO:
    """An empty in-memory file, for writers that want one before `write_atomic`."""
    return io.BytesIO()


def _temp_name(local: str) -> str:
    folder, name = os.path.split(local)
    return os.path.join(folder, f".{name[:100]}.{uuid.uuid4().hex[:12]}{_TEMP_SUFFIX}")


def _swap_in(temp: str, local: str) -> None:
    """Rename the folder `temp` to `local`; what stood there is moved aside first and removed after."""
    if not os.path.lexists(local):
        os.rename(temp, local)
        return
    old = _temp_name(local)
    os.rename(local, old)
    os.rename(temp, local)
    remove(old)


def _files_below(fs: fsspec.AbstractFileSystem, key: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """(whole name, what the store tells) of each file below a folder, by its path from there. Empty objects whose names end
    with a slash, which some programs write for folders (Ray Train does on S3), are none."""
    root, found = fs._strip_protocol(key), fs.find(key, detail=True)
    return {posixpath.relpath(name, root): (name, info) for name, info in found.items() if not name.endswith("/")}


def _remote(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the key in it; another process may have written, so no cached listing."""
    try:
        fs, key = url_to_fs(path)
    except (ImportError, ValueError) as error:
        scheme = path.partition("://")[0]
        raise DataError(
            f"cannot reach {path}: {error}. Install the fsspec package for `{scheme}://`, or use another path"
        ) from error
    fs.invalidate_cache()
    return fs, key


@contextlib.contextmanager
def _told(action: str, path: str) -> Iterator[None]:
    """Turn what the operating system or a store's client raises into one clear `DataError`."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        code = (
            error.errno if error.errno is not None else (errno.ENOENT if isinstance(error, FileNotFoundError) else -1)
        )
        if isinstance(error, PermissionError) and error.errno is None:
            code = errno.EACCES
        mend = _MENDS.get(code, "check the path and the device")
        raise DataError(
            f"cannot {action} {path}: {mend} ({error.strerror or error or type(error).__name__})"
        ) from error
    except Exception as error:
        if is_local(path):
            raise
        text = (
            f"cannot {action} {path}: {type(error).__name__}: {error}. Check the URL, the credentials and the network"
        )
        raise DataError(text) from error
