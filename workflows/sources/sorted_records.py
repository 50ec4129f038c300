"""External merge sort of records."""

from __future__ import annotations

import heapq
import json
import os
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from smalti.errors import DataError

HELD = 100_000  # records in memory
BLOCK_BYTES = 16_384  # read from each run at once while merging

Record = list[Any]  # JSON


class SortedRecords:
    """JSON records, added in any order and iterated sorted.

    At most `HELD` of them are in memory; the others lie in a file of the temporary folder. A record
    is a list whose first items are unique, so that comparisons never reach items that may be null.
    """

    def __init__(self) -> None:
        self.held: list[Record] = []
        self.file: IO[bytes] | None = None
        self.ends = [0]  # of the runs in the file

    def add(self, record: Record) -> None:
        """Add a record.

        Raises:
            DataError: if a run cannot be written to the temporary folder.
        """
        self.held.append(record)
        if len(self.held) >= HELD:
            self._write_run()

    def _write_run(self) -> None:
        self.held.sort()
        try:
            self.file = self.file or tempfile.TemporaryFile()  # noqa: SIM115, open as long as this object
            self.file.writelines(json.dumps(record).encode() + b"\n" for record in self.held)
            self.file.flush()
        except OSError as error:
            raise DataError(
                f"The listing of a folder cannot be sorted in {tempfile.gettempdir()}: {error}. "
                "Free some space there, or set TMPDIR to another folder."
            ) from error
        self.ends.append(self.file.tell())
        self.held = []

    def __iter__(self) -> Iterator[Record]:
        self.held.sort()
        runs = [self._run(start, end) for start, end in zip(self.ends, self.ends[1:], strict=False)]
        yield from heapq.merge(*runs, self.held)

    def _run(self, start: int, end: int) -> Iterator[Record]:
        assert self.file is not None
        rest = b""
        while start < end:
            block = os.pread(self.file.fileno(), min(BLOCK_BYTES, end - start), start)
            start += len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield from map(json.loads, lines)
