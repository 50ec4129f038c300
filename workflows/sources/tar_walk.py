"""A tar as a stream of its members, in order, and what is wrong with its end."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple, cast

from smalti.workflows.sources.listing import is_hidden

BLOCK = 512
BROKEN = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
BAD_HEADER = (ValueError, OverflowError)  # of tarfile, where numbers in a header are none
BZ2_COMPLAINT = "Invalid data stream"  # comes as a bare OSError


class Member(NamedTuple):
    """A file of a tar: its name, where its bytes lie and how many they are, and the bytes; `what` tells why there are none."""

    name: str
    offset: int
    size: int
    data: bytes | None = None
    what: str = ""


class TailReader:
    """A stream that remembers the last bytes it gave, so that the end of the archive can be looked at afterwards.

    What a broken compressed stream still gives before it breaks is given; the error comes with the next read. Reading on
    and on behind the end is an error too: tarfile would do so up to whatever size a damaged header tells.
    """

    KEPT = 4 * tarfile.RECORDSIZE
    EMPTY = 99

    def __init__(self, stream: Any) -> None:
        self._take = getattr(stream, "read1", stream.read)
        self.tail, self.position = b"", 0
        self._error: Exception | None = None
        self._empty = 0  # reads that gave nothing

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        left = size
        while left and self._error is None:
            try:
                part = self._take(left)
            except BROKEN as error:
                self._error = error
                break
            except OSError as error:
                if str(error) != BZ2_COMPLAINT:
                    raise
                self._error = tarfile.ReadError(str(error))
                break
            if not part:
                break
            parts.append(part)
            left -= len(part)
        if not parts and self._error is not None:
            raise self._error
        data = b"".join(parts)
        self._empty += not data
        if self._empty > self.EMPTY:
            raise tarfile.ReadError("unexpected end of data")
        self.position += len(data)
        self.tail = (self.tail + data)[-self.KEPT :]
        return data

    def block(self, offset: int) -> bytes:
        """The 512 bytes at `offset`, or fewer at the end of the stream."""
        while self.position < offset + BLOCK and self.read(BLOCK):
            pass
        start = len(self.tail) - (self.position - offset)
        return self.tail[start : start + BLOCK] if start >= 0 else b""


def headers(stream: BinaryIO) -> Iterator[Member]:
    """Each whole file in a plain tar, without its bytes: only the headers are read."""
    last: tarfile.TarInfo | None = None
    with suppress(*BROKEN, *BAD_HEADER), tarfile.open(fileobj=stream, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            if last is not None:
                yield Member(last.name, last.offset_data, last.size)
            last = info if info.isreg() and not info.issparse() else None
        if last is not None:
            yield Member(last.name, last.offset_data, last.size)


class TarWalk:
    """Members of a tar stream in order; `torn` says afterwards what is wrong with its end, `torn_member` where."""

    def __init__(self, stream: TailReader, max_bytes: int) -> None:
        self.stream, self.max_bytes = stream, max_bytes
        self.torn: str | None = None
        self.torn_member: str | None = None

    def members(self) -> Iterator[Member]:
        """Each unhidden file; without its bytes a link, which a stream cannot follow, a sparse file, whose bytes do not
        lie together, and one of more than `max_bytes`."""
        name: str | None = None
        try:
            with tarfile.open(fileobj=cast(Any, self.stream), mode="r|") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                    if info.isdir() or is_hidden(info.name.removeprefix("./")):
                        continue
                    what = "a sparse file" if info.issparse() else "" if info.isreg() else "a link"
                    if what or info.size > self.max_bytes:
                        yield Member(info.name, info.offset_data, info.size, None, what)
                        continue
                    name = info.name
                    file = tar.extractfile(info)
                    assert file is not None
                    data = file.read()
                    if len(data) < info.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield Member(info.name, info.offset_data, info.size, data)
                    name = None
                end = self.stream.block(tar.offset)
                while rest := self.stream.read(tarfile.RECORDSIZE):  # a compressed stream checks itself at its end
                    if rest.strip(b"\0"):
                        self.torn = "more follows after the archive's end marker, and is not read"
                        break
        except (*BROKEN, *BAD_HEADER) as error:
            self.torn, self.torn_member = f"the archive breaks off: {error}", name
            return
        if len(end) < BLOCK or any(end):
            self.torn = "the archive has no end marker: it is truncated or damaged; samples may be missing"
