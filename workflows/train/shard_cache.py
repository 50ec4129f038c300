"""A cache of a remote artifact's shards on the local disk.

Shards are fetched whole; the least recently used are removed first. Several processes may share a
folder: a file appears there by a rename, and one that is removed while it is read can still be read
to its end.
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
INTERRUPTED_S = 3600
"""A partial file that has not been written to for so long belongs to an interrupted fetch."""


class ShardCache:
    """At most `limit_bytes` of shards in `folder`, or one shard if it alone is larger."""

    def __init__(self, folder: str, limit_bytes: float) -> None:
        if not storage.is_local(folder):
            raise ValueError(f"a cache of shards must be on a local disk, found {folder}")
        self.folder = storage.absolute(folder)
        self.limit_bytes = limit_bytes

    def read(self, artifact_path: str, key: str, columns: Sequence[str] | None = None) -> pa.Table:
        """`smalti.shards.read_shard` through the cache.

        A shard that was rewritten in its artifact is fetched again. One that cannot be read from
        the cache is read from the artifact.
        """
        remote = shards.shard_path(artifact_path, key)
        stamp = hashlib.sha1(f"{remote} {storage.stamp(remote)}".encode()).hexdigest()[:20]
        local = shards.shard_path(self.folder, stamp)
        for _ in range(TRIES):
            if not os.path.exists(local):
                with storage.atomic_file(local) as temp:
                    storage.get_file(remote, temp)
                self._make_room(local)
            try:
                os.utime(local)
                return shards.read_shard(self.folder, stamp, columns)
            except (DataError, FileNotFoundError):  # damaged, or removed by another process
                storage.remove(local)
        return shards.read_shard(artifact_path, key, columns)

    def _make_room(self, fetched: str) -> None:
        """Remove the least recently used files until the rest fits, never the one just fetched.

        What other processes are fetching counts too; files of interrupted fetches are removed.
        """
        used: list[tuple[float, int, str]] = []
        total = 0
        now = time.time()
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                found = os.stat(path)
                if storage.is_temporary(name) and now - found.st_mtime > INTERRUPTED_S:
                    os.remove(path)
                    continue
                total += found.st_size
                if name.endswith(".parquet"):
                    last_used = found.st_mtime if path != fetched else now + 1e9
                    used.append((last_used, found.st_size, path))
        for _, size, path in sorted(used)[:-1]:
            if total <= self.limit_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            total -= size
