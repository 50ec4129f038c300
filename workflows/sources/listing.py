"""List the files of a source: below a folder, or of a pattern."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from smalti import storage
from smalti.errors import DataError
from smalti.workflows.sources.base import (
    IMG2DATASET,
    Unusable,
    filesystem,
    is_arrows,
    is_web,
    of_each,
    open_seekable,
)
from smalti.workflows.sources.network import Files

STATISTICS = "_stats.json"


def is_hidden(path: str) -> bool:
    """Whether a path is hidden or a system file (`__MACOSX`, `Thumbs.db`).

    `.` and `..` are not hidden: an archive's member under `../` is read like any other.
    """
    parts = [part for part in path.split("/") if part not in (".", "..")] or [path]
    return any(
        part.startswith((".", "__MACOSX")) or part == "lost+found" for part in parts
    ) or parts[-1].lower() in (
        "thumbs.db",
        "desktop.ini",
    )


class SideTables:
    """Finds the tables that img2dataset writes beside its tars and folders.

    Such a table is `00000.parquet` beside `00000.tar` or `00000/`, with `00000_stats.json` or
    img2dataset's columns. Memory holds the names of folders, tars, Parquet files and statistics.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.shards: set[str] = set()
        self.counted: set[str] = set()  # shards with statistics
        self.tables: list[str] = []

    def meet(self, name: str) -> None:
        if "/" in name:
            self.shards.add(name.rsplit("/", 1)[0])
        if name.endswith(".tar"):
            self.shards.add(name[:-4])
        if name.endswith(STATISTICS):
            self.counted.add(name.removesuffix(STATISTICS))
        if name.endswith(".parquet"):
            self.tables.append(name)

    def found(self) -> set[str]:
        """The tables among the names so far."""
        beside = [name for name in self.tables if name.removesuffix(".parquet") in self.shards]
        known = [name for name in beside if name.removesuffix(".parquet") in self.counted]
        open_them = [name for name in beside if name.removesuffix(".parquet") not in self.counted]
        fits = of_each(self._has_columns, open_them)
        return {*known, *(name for name, fit in zip(open_them, fits, strict=True) if fit)}

    def _has_columns(self, name: str) -> bool:
        """Whether a table has img2dataset's columns, or cannot be read at all."""
        try:
            with (
                open_seekable(storage.join(self.root, name)) as stream,
                pq.ParquetFile(stream) as file,
            ):
                return IMG2DATASET.issubset(file.schema_arrow.names)
        except (pa.ArrowException, OSError) as error:
            if not is_arrows(error):
                raise
            return True


def each_file(root: str, lost: list[Unusable]) -> Iterator[str]:
    """Yield relative paths of the files below a folder, without hidden ones.

    Folders that cannot be read are added to `lost`. On a local disk links to folders are followed;
    no folder is read twice, so that circular links end. A folder of an object store takes one or
    several requests, which are not cached.

    Raises:
        OSError: if the store does not answer.
    """
    fs, inside = filesystem(root)
    errors: list[OSError] = []
    names = _walk(inside, errors) if storage.is_local(root) else _walk_store(fs, inside, errors)
    yield from (name for name in names if not is_hidden(name))
    for error in errors:
        where = os.path.relpath(str(error.filename), inside) if error.filename else ""
        lost.append(Unusable(where, "unreadable", str(error)))


def _walk(root: str, errors: list[OSError]) -> Iterator[str]:
    seen: set[str] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(os.path.join(root, folder))
        if real in seen:
            continue
        seen.add(real)
        folders: list[str] = []
        try:
            with os.scandir(os.path.join(root, folder) if folder else root) as found:
                for entry in found:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        folders.append(name)
                    else:
                        yield name
        except OSError as error:
            errors.append(error)
        waiting += sorted(folders, reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk_store(fs: Files, root: str, errors: list[OSError]) -> Iterator[str]:
    root = root.rstrip("/")
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            found = fs.ls(folder, detail=True)
        except FileNotFoundError as error:  # a page may link to a missing folder
            errors.append(error)
            continue
        fs.invalidate_cache()  # it would keep every listing in memory
        for info in found:
            path = info["name"].rstrip("/")
            if path == folder:
                continue  # the folder's own marker object
            if info["type"] == "directory":
                waiting.append(path)
            else:
                yield path[len(root) + 1 :]


def find_files(source: str, accepts: Callable[[str], bool], kind: str) -> list[str]:
    """Files of a kind that a path, a pattern or a folder names.

    Raises:
        DataError: if there are none.
    """
    fs, inside = filesystem(source)
    if not fs.isdir(inside):
        return expand(source)
    lost: list[Unusable] = []
    paths = [
        storage.join(source, name) for name in sorted(filter(accepts, each_file(source, lost)))
    ]
    if lost:
        raise DataError(
            f"corpus.source: {source} cannot be read completely ({lost[0].detail}). Check its "
            "permissions, or name files."
        )
    if not paths:
        raise DataError(
            f"corpus.source: there is no {kind} in {source}. Name files, or set corpus.format."
        )
    return paths


def expand(pattern: str) -> list[str]:
    """Files of a path, glob or brace pattern (`{00000..00012}`, `{a,b}`).

    They are sorted within each alternative. If a file has exactly this name, it is not read as a
    pattern.

    Raises:
        DataError: if nothing matches.
    """
    if _is_there(pattern):
        return [pattern]
    found: list[str] = []
    for path, names in zip(paths := _braces(pattern), of_each(_names, paths), strict=True):
        if not names:
            where = "" if path == pattern else f" (of {pattern})"
            raise DataError(
                f"corpus.source: nothing found at {path}{where}. Check the path, and quote "
                "patterns."
            )
        found += names
    return found


def _names(path: str) -> list[str]:
    """Files of a path or glob; in a web address `?` starts the query."""
    fs, inside = filesystem(path)
    if any(char in path for char in ("*[" if is_web(path) else "*?[")):
        names = sorted(str(fs.unstrip_protocol(name)) for name in fs.glob(inside))
        return [name.removeprefix("file://") for name in names]
    return [path] if _is_there(path) else []


def _is_there(path: str) -> bool:
    if storage.is_local(path):
        return storage.exists(path)
    fs, inside = filesystem(path)
    return bool(fs.exists(inside))


def _braces(pattern: str) -> list[str]:
    """Alternatives of a brace pattern, left to right.

    `{01..10}` keeps its zeros; braces may be nested.
    """
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    end = start
    commas = [start]
    depth = 0
    for end in range(start, len(pattern)):
        depth += (pattern[end] == "{") - (pattern[end] == "}")
        if pattern[end] == "," and depth == 1:
            commas.append(end)
        if not depth:
            break
    else:
        return [pattern]
    body = pattern[start + 1 : end]
    rest = _braces(pattern[end + 1 :])
    first, dots, last = body.partition("..")
    if len(commas) > 1:
        parts = [pattern[one + 1 : two] for one, two in pairwise([*commas, end])]
        middle = [one for part in parts for one in _braces(part)]
    elif dots and first.isdigit() and last.isdigit():
        step = 1 if int(first) <= int(last) else -1
        middle = [str(n).zfill(len(first)) for n in range(int(first), int(last) + step, step)]
    else:
        raise DataError(
            f"corpus.source: {{{body}}} in {pattern} is neither a range such as 00000..00012 nor a "
            "list a,b."
        )
    return [pattern[:start] + part + tail for part in middle for tail in rest]
