"""Shards of a distant artifact on the local disk: fetched whole once, the least recently used leave
first.

Any number of processes may share a folder: a file appears there by a rename, and one that is
removed while it is read can be read to its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence

import pyarrow as pa

from smalti import shards, storage
from smalti.errors import DataError

TRIES = 3
BROKEN_OFF_S = 3600
"""How long nothing was written to a file that is no longer being fetched."""


class ShardCache:
    """At most `limit_bytes` of shards in `folder`, or one shard where it alone is larger."""

    def __init__(self, folder: str, limit_bytes: float) -> None:
        self.folder, self.limit_bytes = storage.absolute(folder), limit_bytes
        if not storage.is_local(folder):
            raise ValueError(f"a cache of shards lies on a local disk, not in {folder}")

    def read(self, artifact_path: str, key: str, columns: Sequence[str] | None = None) -> pa.Table:
        """`smalti.shards.read_shard` through the cache; a shard that was made again at its place is
        fetched again, and one that cannot be read from the cache is read where it lies.
        """
        distant = shards.shard_path(artifact_path, key)
        stamp = hashlib.sha1(f"{distant} {storage.stamp(distant)}".encode()).hexdigest()[:20]
        local = shards.shard_path(self.folder, stamp)
        for _ in range(TRIES):
            if not os.path.exists(local):
                with storage.atomic_file(local) as temp:
                    storage.get_file(distant, temp)
                self._make_room(local)
            try:
                os.utime(local)
                return shards.read_shard(self.folder, stamp, columns)
            except (
                DataError,
                FileNotFoundError,
            ):  # another process made room, or the file was damaged
                storage.remove(local)
        return shards.read_shard(artifact_path, key, columns)

    def _make_room(self, fetched: str) -> None:
        """Remove the least recently used files until the rest fits, never the one just fetched;
        what other processes are fetching counts too, and what is left of a fetch that a kill
        broke off goes.
        """
        used: list[tuple[float, int, str]] = []
        total, now = 0, time.time()
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            with contextlib.suppress(FileNotFoundError):  # another process made room
                found = os.stat(path)
                if storage.is_temporary(name) and now - found.st_mtime > BROKEN_OFF_S:
                    os.remove(path)
                    continue
                total += found.st_size
                if name.endswith(".parquet"):
                    used.append(
                        (found.st_mtime if path != fetched else now + 1e9, found.st_size, path)
                    )
        for _, size, path in sorted(used)[:-1]:
            if total <= self.limit_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            total -= size
