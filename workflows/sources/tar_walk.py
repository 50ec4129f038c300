"""Read a tar as a stream of its members, and detect truncation."""

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
BAD_HEADER = (ValueError, OverflowError)  # of tarfile, for malformed numbers in a header
BZ2_COMPLAINT = "Invalid data stream"  # raised as a plain OSError


class Member(NamedTuple):
    """A file of a tar.

    `what`: why `data` is missing (a link, a sparse file).
    """

    name: str
    offset: int
    size: int
    data: bytes | None = None
    what: str = ""


class TailReader:
    """A stream that keeps its last bytes, so that the end of the archive can be checked.

    Of a damaged compressed stream the bytes before the damage are returned; the next read raises
    the error. Repeated reads past the end raise an error too: tarfile would read up to the size in
    a damaged header.
    """

    KEPT = 4 * tarfile.RECORDSIZE
    EMPTY = 99

    def __init__(self, stream: BinaryIO) -> None:
        self._take = getattr(stream, "read1", stream.read)
        self.tail = b""
        self.position = 0
        self._error: Exception | None = None
        self._empty = 0  # reads that returned nothing

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
    """Yield each complete file of a plain tar; only headers are read."""
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
    """Members of a tar stream, in order.

    Afterwards `torn` says what is wrong with its end (None if nothing), and `torn_member` names the
    incomplete member.
    """

    def __init__(self, stream: TailReader, max_bytes: int) -> None:
        self.stream = stream
        self.max_bytes = max_bytes
        self.torn: str | None = None
        self.torn_member: str | None = None

    def members(self) -> Iterator[Member]:
        """Yield each file that is not hidden.

        Links, sparse files and files over `max_bytes` come without their bytes.
        """
        name: str | None = None
        try:
            with tarfile.open(fileobj=cast(Any, self.stream), mode="r|") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # otherwise every header stays in memory
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
                # a compressed stream checks itself at its end
                while rest := self.stream.read(tarfile.RECORDSIZE):
                    if rest.strip(b"\0"):
                        self.torn = "more follows after the archive's end marker, and is not read"
                        break
        except (*BROKEN, *BAD_HEADER) as error:
            self.torn = f"the archive breaks off: {error}"
            self.torn_member = name
            return
        if len(end) < BLOCK or any(end):
            self.torn = (
                "the archive has no end marker: it is truncated or damaged; samples may be missing"
            )
