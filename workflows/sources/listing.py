"""The files that a source names: below a folder, of a pattern; listed without holding their names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from smalti import storage
from smalti.errors import DataError
from smalti.workflows.sources.base import Lost, filesystem


def is_hidden(path: str) -> bool:
    """Whether a relative path is an operating system's litter: dot files and folders, `__MACOSX`, `Thumbs.db`.

    The `.` and `..` of a path are no names: what an archive holds under `../` is read as any other member."""
    parts = [part for part in path.split("/") if part not in (".", "..")] or [path]
    return any(part.startswith((".", "__MACOSX")) or part == "lost+found" for part in parts) or parts[-1].lower() in (
        "thumbs.db",
        "desktop.ini",
    )


class SideTables:
    """The tables that img2dataset writes beside its tars and folders, among names met one by one: `00000.parquet` beside
    `00000.tar` or `00000/`. Held are the names of folders, tars and Parquet files."""

    def __init__(self) -> None:
        self.shards: set[str] = set()
        self.tables: list[str] = []

    def meet(self, name: str) -> None:
        if "/" in name:
            self.shards.add(name.rsplit("/", 1)[0])
        if name.endswith(".tar"):
            self.shards.add(name[:-4])
        if name.endswith(".parquet"):
            self.tables.append(name)

    def found(self) -> set[str]:
        """The tables among the names so far."""
        return {name for name in self.tables if name.removesuffix(".parquet") in self.shards}


def each_file(root: str, lost: list[Lost]) -> Iterator[str]:
    """Relative paths of the unhidden files below a folder, folder by folder; what cannot be read of it comes to `lost`.

    On a local disk links to folders are followed; a folder met again (a circle of links) is not read twice. A folder of
    an object store is one request or some, and none of them is kept. Errors: OSError.
    """
    fs, inside = filesystem(root)
    errors: list[OSError] = []
    names = _walk(inside, errors) if storage.is_local(root) else _walk_store(fs, inside, errors)
    yield from (name for name in names if not is_hidden(name))
    for error in errors:
        where = os.path.relpath(str(error.filename), inside) if error.filename else ""
        lost.append(Lost(where, "unreadable", str(error)))


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
    except OSError:  # a link in a circle of its own
        return False


def _walk_store(fs: Any, root: str, errors: list[OSError]) -> Iterator[str]:
    root = root.rstrip("/")
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            found = fs.ls(folder, detail=True)
        except FileNotFoundError as error:  # a page may link to a folder that is not there
            errors.append(error)
            continue
        fs.invalidate_cache()  # it would hold every listing
        for info in found:
            path = info["name"].rstrip("/")
            if path == folder:
                continue  # an object that stands for the folder
            if info["type"] == "directory":
                waiting.append(path)
            else:
                yield path[len(root) + 1 :]


def find_files(source: str, accepts: Callable[[str], bool], kind: str) -> list[str]:
    """Files of a kind that a path, a pattern, or a folder names. Errors: DataError when there are none."""
    fs, inside = filesystem(source)
    if not fs.isdir(inside):
        return expand(source)
    lost: list[Lost] = []
    paths = [storage.join(source, name) for name in sorted(filter(accepts, each_file(source, lost)))]
    if lost:
        raise DataError(
            f"corpus.source: {source} cannot be read whole ({lost[0].detail}). Check its permissions, or name files."
        )
    if not paths:
        raise DataError(f"corpus.source: no {kind} lies in {source}. Name files, or set corpus.format.")
    return paths


def expand(pattern: str) -> list[str]:
    """Files that a path, glob or brace pattern (`{00000..00012}`, `{a,b}`) names, sorted within each alternative.

    A file of that very name comes before what it could mean as a pattern. Errors: DataError when nothing is named.
    """
    if storage.exists(pattern):
        return [pattern]
    found: list[str] = []
    for path in _braces(pattern):
        fs, inside = filesystem(path)
        if any(char in path for char in "*?["):
            names = sorted(str(fs.unstrip_protocol(name)) for name in fs.glob(inside))
        else:
            names = [path] if fs.exists(inside) else []
        if not names:
            where = "" if path == pattern else f" (of {pattern})"
            raise DataError(f"corpus.source: nothing is found at {path}{where}. Check the path, and quote patterns.")
        found += [name.removeprefix("file://") for name in names]
    return found


def _braces(pattern: str) -> list[str]:
    """Every alternative of a brace pattern, left to right; `{01..10}` keeps the zeros."""
    start = pattern.find("{")
    end = pattern.find("}", start)
    if start < 0 or end < 0:
        return [pattern]
    body, rest = pattern[start + 1 : end], _braces(pattern[end + 1 :])
    first, dots, last = body.partition("..")
    if dots and first.isdigit() and last.isdigit():
        step = 1 if int(first) <= int(last) else -1
        middle = [str(n).zfill(len(first)) for n in range(int(first), int(last) + step, step)]
    elif "," in body:
        middle = body.split(",")
    else:
        raise DataError(
            f"corpus.source: {{{body}}} in {pattern} is neither a range such as 00000..00012 nor a list a,b."
        )
    return [pattern[:start] + part + tail for part in middle for tail in rest]
