"""Rows of shards, read with bounded memory.

Legend: H, W image sides; T tokens.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from smalti import images, shards, storage
from smalti.errors import DataError, ImageError
from smalti.progress import log
from smalti.workflows.pipeline.retry import retry_storage
from smalti.workflows.train.order import PrefetchWindow
from smalti.workflows.train.shard_cache import ShardCache
from smalti.workflows.train.task import Values

if TYPE_CHECKING:
    from smalti.schema import Train

TABLE_CACHE_BYTES = 1 << 30
PIXEL_CACHE_BYTES = 1 << 30
FOOTER_THREADS = 16
AHEAD_THREADS = 2
IN_USE = 3
"""Shards whose rows threads may be reading at once."""

Prepared = Any
"""What a source computes once per table; its subclass knows the type."""


def shard_index(artifact_path: str, split: str) -> tuple[list[str], list[int]]:
    """Shards of a split, from their footers.

    Returns:
        Their keys, and their numbers of rows.

    Raises:
        DataError: the split has no rows.
    """
    keys = shards.list_shards(artifact_path, split)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        sizes = list(pool.map(lambda key: shards.shard_rows(artifact_path, key), keys))
    if not sum(sizes):
        raise DataError(
            f"{artifact_path} holds no rows in its {split!r} split; training needs some. "
            f"Check its counts with `smalti show {artifact_path}`."
        )
    return keys, sizes


class ShardRows:
    """Rows of the shards of one split.

    Whole tables are kept in memory: those near the step (see `prefetch`) up to `window_bytes`, and
    the most recently used others up to `cache_bytes`.
    """

    def __init__(
        self,
        artifact_path: str,
        keys: Sequence[str],
        sizes: Sequence[int],
        columns: Sequence[str] | None = None,
        *,
        cache_bytes: float = TABLE_CACHE_BYTES,
    ) -> None:
        self.path = artifact_path
        self.keys = list(keys)
        self.sizes = list(sizes)
        self.columns = list(columns) if columns is not None else None
        self.cache_bytes = cache_bytes
        self.window_bytes = cache_bytes
        self.disk: ShardCache | None = None
        self.say: Callable[[str], None] = log
        self.say_own: Callable[[str], None] = log
        self._tables: OrderedDict[int, tuple[pa.Table, int, Prepared]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # of the kept tables; not held while one is read
        self._reading: dict[int, threading.Lock] = {}
        self._near = PrefetchWindow(frozenset(), (), ())
        self._short = False  # whether the window has been too large for memory
        self._ahead: ThreadPoolExecutor | None = None

    def configure(
        self,
        train: Train,
        say: Callable[[str], None],
        say_own: Callable[[str], None] | None = None,
    ) -> None:
        """Take the settings of memory and disk.

        Args:
            train: of the stage.
            say: gets lines that concern all workers.
            say_own: gets lines about what this worker alone meets; default `say`.
        """
        self.say = say
        self.say_own = say_own or say
        self.window_bytes = train.data_gb * 1e9
        self.cache_bytes = min(self.cache_bytes, self.window_bytes)
        if train.cache_dir is not None:
            self.cache_on_disk(train.cache_dir, train.cache_gb * 1e9)

    def cache_on_disk(self, folder: str, limit_bytes: float) -> None:
        """Read the shards of a remote artifact through a local folder of at most `limit_bytes`."""
        if not storage.is_local(self.path):
            self.disk = ShardCache(folder, limit_bytes)

    def prefetch(self, near: PrefetchWindow) -> None:
        """Keep the shards near a step, and read those that are missing in threads.

        `table` raises the errors of reading them.
        """
        if near == self._near:
            return
        with self._lock:
            self._near = near
            wanted = [shard for shard in (*near.own, *near.next) if shard not in self._tables]
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(AHEAD_THREADS, thread_name_prefix="ahead")
        for shard in dict.fromkeys(wanted):
            self._ahead.submit(self._read_ahead, near, shard)

    def _read_ahead(self, near: PrefetchWindow, shard: int) -> None:
        if near is self._near and (shard in near.around or self._bytes < self.window_bytes):
            self.table(shard)

    def table(self, shard: int) -> tuple[pa.Table, Prepared]:
        """A shard's table, and what `prepare` returned for it."""
        found = self._kept(shard)
        if found is not None:
            return found
        with self._lock:
            reading = self._reading.setdefault(shard, threading.Lock())
        with reading:  # keeps two threads from reading the same shard twice
            found = self._kept(shard)
            if found is None:
                found = self._read_table(shard)
                self._keep(shard, *found)
        return found

    def _kept(self, shard: int) -> tuple[pa.Table, Prepared] | None:
        with self._lock:
            if shard not in self._tables:
                return None
            self._tables.move_to_end(shard)
            table, _, prepared = self._tables[shard]
            return table, prepared

    def _read_table(self, shard: int) -> tuple[pa.Table, Prepared]:
        read = shards.read_shard if self.disk is None else self.disk.read
        place = (self.path, self.keys[shard], self.columns)
        table = (
            read(*place)
            if storage.is_local(self.path)
            else retry_storage(read, *place, say=self.say_own)
        )
        prepared = self.prepare(table)
        found = self.rows_in(table, prepared)
        if found != self.sizes[shard]:
            raise DataError(
                f"shard {self.keys[shard]} of {self.path} holds {found} rows to train on, but "
                f"{self.sizes[shard]} when training began: it was rewritten meanwhile. Run the "
                "same command again."
            )
        return table, prepared

    def _keep(self, shard: int, table: pa.Table, prepared: Prepared) -> None:
        """Keep a table, and drop others that no longer fit."""
        with self._lock:
            self._tables[shard] = (table, table.nbytes, prepared)
            self._bytes += table.nbytes
            short = self._make_room(shard)
            first_time = short and not self._short
            self._short = self._short or short
        if first_time:
            self.say(
                f"the shards of {self.path} that contain a worker's batches take more than "
                f"train.data_gb={self.window_bytes / 1e9:g}, so they are read repeatedly: raise "
                "it, lower train.data_window, or use more workers"
            )

    def _make_room(self, shard: int) -> bool:
        """Drop tables until the rest fits; True if even the step's window does not.

        First those far from the step (least recently used first), then those of the next window,
        then of the window itself the most recently used: batches go round it, so these are due
        last. The latest `IN_USE` stay, since threads are still reading their rows.
        """
        near = self._near
        others = [kept for kept in self._tables if kept != shard]
        following = set(near.next) - near.around
        far = [kept for kept in others if kept not in near.around and kept not in following]
        later = [kept for kept in reversed(others) if kept in following]
        window = [kept for kept in reversed(others) if kept in near.around]
        while far and self._bytes > self.cache_bytes:
            self._drop(far.pop(0))
        while later and self._bytes > self.window_bytes:
            self._drop(later.pop(0))
        short = bool(window) and shard in near.around and self._bytes > self.window_bytes
        while len(window) > IN_USE and self._bytes > self.window_bytes:
            self._drop(window.pop(IN_USE))
        return short

    def _drop(self, shard: int) -> None:
        self._bytes -= self._tables.pop(shard)[1]

    def prepare(self, table: pa.Table) -> Prepared:
        """What to compute once per table; it is kept with the table."""
        return None

    def rows_in(self, table: pa.Table, prepared: Prepared) -> int:
        """Number of rows of a shard that are trained on."""
        return table.num_rows

    def read(self, shard: int, row: int) -> tuple[str, Values]:
        """A shard's key, and one of its rows as Python values."""
        table, _ = self.table(shard)
        return self.keys[shard], {
            name: table.column(name)[row].as_py() for name in table.column_names
        }


class ImageRows(ShardRows):
    """Rows of a corpus, decoded.

    `pixels` is uint8 (H, W, 3) after resize and centre crop, H = W = `image_size`. Decoded pixels
    are kept if those of the whole split fit into `pixel_bytes`; then later epochs decode nothing.
    """

    def __init__(
        self,
        artifact_path: str,
        keys: Sequence[str],
        sizes: Sequence[int],
        image_size: int,
        *,
        max_pixels: int,
        text: Sequence[str] = ("caption", "label"),
        pixel_bytes: int = PIXEL_CACHE_BYTES,
    ) -> None:
        super().__init__(artifact_path, keys, sizes, ["image_id", "image", *text])
        self.image_size = image_size
        self.max_pixels = max_pixels
        keep = sum(sizes) * image_size * image_size * 3 <= pixel_bytes
        self._pixels: dict[tuple[int, int], Values] | None = {} if keep else None

    def prefetch(self, near: PrefetchWindow) -> None:
        if self._pixels is None or len(self._pixels) < sum(self.sizes):
            super().prefetch(near)

    def read(self, shard: int, row: int) -> tuple[str, Values]:
        """A row with `pixels` instead of `image`.

        Raises:
            DataError: the image does not decode.
        """
        if self._pixels is not None and (shard, row) in self._pixels:
            return self.keys[shard], self._pixels[shard, row]
        key, values = super().read(shard, row)
        values = dict(values)
        try:
            values["pixels"] = images.to_pixels(
                values.pop("image"), self.image_size, max_pixels=self.max_pixels
            )
        except ImageError as error:
            raise DataError(
                f"image {values['image_id']} in shard {key} of {self.path} does not decode "
                f"({error}), though the corpus stage verified it: the shard was damaged. Remove "
                "that shard and run the corpus stage again."
            ) from error
        if self._pixels is not None:
            self._pixels[shard, row] = values
        return key, values


class TokenRows(ShardRows):
    """Rows of a token artifact; `codes` is int32 (T,), or has the tokenizer's further axes."""

    def prepare(self, table: pa.Table) -> Prepared:
        return shards.codes(table)

    def read(self, shard: int, row: int) -> tuple[str, Values]:
        table, codes = self.table(shard)
        values = {
            name: table.column(name)[row].as_py() for name in table.column_names if name != "codes"
        }
        return self.keys[shard], values | {"codes": codes[row]}


class Joined:
    """The rows of several sources as one: their shards are numbered consecutively."""

    def __init__(self, *sources: ShardRows) -> None:
        self.sources = sources
        self.sizes = [size for source in sources for size in source.sizes]
        self.starts = [0]
        for source in sources[:-1]:
            self.starts.append(self.starts[-1] + len(source.sizes))

    def configure(
        self,
        train: Train,
        say: Callable[[str], None],
        say_own: Callable[[str], None] | None = None,
    ) -> None:
        """As `ShardRows.configure`; each source may hold as much."""
        for source in self.sources:
            source.configure(train, say, say_own)

    def prefetch(self, near: PrefetchWindow) -> None:
        """As `ShardRows.prefetch`, of each source its own shards."""
        for source, start in zip(self.sources, self.starts, strict=True):
            source.prefetch(near.shifted(range(start, start + len(source.sizes))))

    def read(self, shard: int, row: int) -> tuple[str, Values]:
        number = bisect_right(self.starts, shard) - 1
        return self.sources[number].read(shard - self.starts[number], row)
