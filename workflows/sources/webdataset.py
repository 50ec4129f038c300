"""WebDataset tars: streamed, never extracted; members that share a key make a sample.

A member's key is its path up to the first dot of its name. Members of one sample usually follow each other; any other
order is taken too (see `_Far`). A tar without its end marker is truncated: what came before is kept, the loss is told.
"""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from fsspec.compression import available_compressions
from fsspec.utils import infer_compression

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    IMAGE_SUFFIXES,
    Locator,
    Lost,
    ReadBytes,
    Sample,
    clean_text,
    load_json,
    open_seekable,
    read_pairs,
    too_large,
)
from smalti.workflows.sources.listing import find_files, is_hidden

WINDOW = 256  # keys that wait for more members
BLOCK = 512
BROKEN = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
BZ2_COMPLAINT = "Invalid data stream"  # comes as a bare OSError
TEXTS = ("txt", "caption", "text", "json", "cls")


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


@dataclass
class _Members:
    """What has come of one key: texts by extension, images as (extension, locator, bytes), extensions of the rest."""

    images: list[tuple[str, Locator, bytes]] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    large: bool = False


@dataclass(frozen=True)
class TarGroup:
    """One tar file, plain or compressed (.gz, .bz2, .xz, .zst by name)."""

    path: str
    caption_column: str = "caption"
    label_column: str = "label"
    max_bytes: int = 200_000_000

    @property
    def in_order(self) -> bool:
        return compression_of(self.path) is not None

    @property
    def source(self) -> str:
        return self.path

    def samples(self) -> Iterator[Sample | Lost]:
        waiting: OrderedDict[str, _Members] = OrderedDict()
        far = _Far(self)
        torn: str | None = None
        with self._open() as stream:
            walk = _TarWalk(TailReader(stream), self.max_bytes)
            for name, offset, size, data in walk.members():
                key, extension = split_name(name)
                members = waiting.setdefault(key, _Members())
                if is_image(extension) and size > self.max_bytes:
                    yield too_large(name, size, self.max_bytes)
                    members.large = True
                elif is_image(extension) and data is not None:
                    members.images.append((extension, (offset, len(data)), data))
                elif extension in TEXTS and data is not None:
                    members.texts[extension] = data
                else:
                    members.others.add(f"{extension} (a link)" if data is None and not size else extension)
                if len(waiting) > WINDOW:
                    far.passed = True
                    yield from self._samples(*waiting.popitem(last=False), far)
            torn = walk.torn
        if torn is not None and walk.torn_member is not None:
            key = split_name(walk.torn_member)[0]
            if waiting.pop(key, None) is not None:
                yield Lost(key, "truncated_tar", f"its member {walk.torn_member} is cut off")
        for key, members in waiting.items():
            yield from self._samples(key, members, far)
        if torn is not None:
            yield Lost(walk.torn_member or "", "truncated_tar", torn)

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        with self._open() as stream:

            def read(locator: Locator) -> bytes:
                stream.seek(locator[0])
                return stream.read(locator[1])

            yield read

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with open_seekable(self.path, compression_of(self.path)) as stream:
            yield stream

    def _samples(self, key: str, members: _Members, far: _Far) -> Iterator[Sample | Lost]:
        """The sample of a key, or why there is none. Of several images the first with the plainest extension is taken;
        a mask beside it (`a.mask.png`) is no image of its own, another as plain is one, and lost."""
        far.complete(key, members)
        if not members.images:
            if members.large or (members.texts and far.has_image(key)):
                return  # counted already, or counted where the image lies
            there = sorted(members.others.union(members.texts))
            yield Lost(key, "no_image", f"members: {', '.join(name or 'one without extension' for name in there)}")
            return
        fewest = min(extension.count(".") for extension, _, _ in members.images)
        (taken, locator, data), *more = [image for image in members.images if image[0].count(".") == fewest]
        yield self._sample(key, locator, data, members)
        for extension, _, _ in more:
            told = f"{key}.{extension} has the key of {key}.{taken}; a key ends at the first dot of the name"
            yield Lost(key, "second_image", told)

    def _sample(self, key: str, locator: Locator, data: bytes, members: _Members) -> Sample | Lost:
        record: dict[str, Any] = {}
        try:
            if "json" in members.texts:
                loaded = load_json(members.texts["json"])
                record = loaded if isinstance(loaded, dict) else {}
            qa = read_pairs(record)
        except (ValueError, TypeError) as error:
            return Lost(key, "bad_metadata", f"{key}.json: {error}")
        texts = [members.texts.get(name) for name in ("txt", "caption", "text")]
        captions = [*texts, record.get(self.caption_column), record.get("text")]
        caption = next((text for text in map(clean_text, captions) if text), None)
        label = clean_text(record.get(self.label_column)) or clean_text(members.texts.get("cls"))
        return Sample(key, locator, data, caption, label, qa)


class _Far:
    """Members that lie further from their key's others than the window: a tar may hold all images, then all texts.

    The first key that is not complete within the window makes the tar's headers be read once; kept are, for each key, the
    places of its texts (their bytes where the tar is compressed, and a place cannot be gone to) and whether it has an
    image. Until then it costs nothing.
    """

    def __init__(self, group: TarGroup) -> None:
        self.group = group
        self.texts: dict[str, list[tuple[str, Locator, bytes | None]]] | None = None
        self.images: set[str] = set()
        self.passed = False  # whether the window was full

    def complete(self, key: str, members: _Members) -> None:
        """Add the texts of a key that lie elsewhere."""
        if self.passed and self.texts is None and bool(members.images) != bool(members.texts):
            self._scan()
        far = [one for one in (self.texts or {}).get(key, ()) if one[0] not in members.texts]
        if not far or not members.images:
            return
        with self.group.reader() as read:
            for extension, locator, data in far:
                members.texts[extension] = read(locator) if data is None else data

    def has_image(self, key: str) -> bool:
        """Whether an image of a key lies anywhere in the tar."""
        return key in self.images

    def _scan(self) -> None:
        self.texts = {}
        with self.group._open() as stream:
            if compression_of(self.group.path) is None:
                found = _headers(stream)
            else:
                found = _TarWalk(TailReader(stream), self.group.max_bytes).members()
            for name, offset, size, data in found:
                key, extension = split_name(name)
                if is_image(extension):
                    self.images.add(key)
                elif extension in TEXTS and size <= self.group.max_bytes:
                    self.texts.setdefault(key, []).append((extension, (offset, size), data))


def _headers(stream: BinaryIO) -> Iterator[tuple[str, int, int, bytes | None]]:
    """(name, offset of the data, its size, None) of each whole file in a plain tar: only the headers are read."""
    last: tarfile.TarInfo | None = None
    with suppress(*BROKEN), tarfile.open(fileobj=stream, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            if last is not None:
                yield last.name, last.offset_data, last.size, None
            last = info if info.isreg() else None
        if last is not None:
            yield last.name, last.offset_data, last.size, None


class _TarWalk:
    """Members of a tar stream in order; `torn` says afterwards what is wrong with its end, `torn_member` where."""

    def __init__(self, stream: TailReader, max_bytes: int) -> None:
        self.stream, self.max_bytes = stream, max_bytes
        self.torn: str | None = None
        self.torn_member: str | None = None

    def members(self) -> Iterator[tuple[str, int, int, bytes | None]]:
        """(name, offset of the data, its size, data) of each unhidden file; no data for a link, which a stream cannot
        follow, and none of more than `max_bytes`."""
        name: str | None = None
        try:
            with tarfile.open(fileobj=cast(Any, self.stream), mode="r|") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                    if info.isdir() or is_hidden(info.name.removeprefix("./")):
                        continue
                    if not info.isreg() or info.size > self.max_bytes:
                        yield info.name, info.offset_data, info.size, None
                        continue
                    name = info.name
                    file = tar.extractfile(info)
                    assert file is not None
                    data = file.read()
                    if len(data) < info.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield info.name, info.offset_data, info.size, data
                    name = None
                end = self.stream.block(tar.offset)
                while rest := self.stream.read(tarfile.RECORDSIZE):  # a compressed stream checks itself at its end
                    if rest.strip(b"\0"):
                        self.torn = "more follows after the archive's end marker, and is not read"
                        break
        except BROKEN as error:
            self.torn, self.torn_member = f"the archive breaks off: {error}", name
            return
        if len(end) < BLOCK or any(end):
            self.torn = "the archive has no end marker: it is truncated or damaged; samples may be missing"


def is_image(extension: str) -> bool:
    """Whether a member's extension (`jpg`, `left.png`) is an image's."""
    return "." + extension.rsplit(".", 1)[-1] in IMAGE_SUFFIXES


def split_name(name: str) -> tuple[str, str]:
    """`a/b.left.PNG` → (`a/b`, `left.png`): key and extension as WebDataset has them."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def tar_groups(source: str, section: CorpusSection, seed: int) -> list[TarGroup]:
    """A group for each tar that a path, pattern or folder names. Errors: DataError, also for an unknown compression."""
    paths = find_files(source, is_tar, "tar")
    for path in paths:
        compression_of(path)
    return [TarGroup(path, section.caption_column, section.label_column, section.max_bytes) for path in paths]


def compression_of(path: str) -> str | None:
    """fsspec's name of the compression that a file's name tells. Errors: DataError when a package for it is missing."""
    name = path.lower()
    if name.endswith(".zst") and "zstd" not in available_compressions():
        raise DataError(f"corpus.source: reading {path} needs the package zstandard. Run `pip install zstandard`.")
    return "gzip" if name.endswith(".tgz") else infer_compression(name)


def is_tar(path: str) -> bool:
    """Whether a name is a tar's, plain or compressed."""
    return path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
