"""Paths and URLs as text: nothing here reads or writes a file."""

from __future__ import annotations

import os
import posixpath
import uuid

TEMP_SUFFIX = ".smalti-tmp"


def is_local(path: str) -> bool:
    """True for a plain path and for `file://…`."""
    return "://" not in path or path.startswith(("file://", "local://"))


def local_path(path: str) -> str:
    """A local path without its `file://`, and with `~` expanded."""
    for scheme in ("file://", "local://"):
        path = path.removeprefix(scheme)
    return os.path.expanduser(path)


def is_temporary(name: str) -> bool:
    """True for the name of an unfinished write, running or interrupted."""
    return name.endswith(TEMP_SUFFIX)


def absolute(path: str) -> str:
    """The absolute local path; a URL unchanged."""
    return os.path.abspath(local_path(path)) if is_local(path) else path


def join(root: str, *parts: str) -> str:
    """`root/part/…`, for paths and URLs."""
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


def temp_name(local: str) -> str:
    """A new temporary name in the folder of `local`."""
    folder, name = os.path.split(local)
    return os.path.join(folder, f".{name[:100]}.{uuid.uuid4().hex[:12]}{TEMP_SUFFIX}")
