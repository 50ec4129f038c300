"""WebDataset tars: streamed, never extracted; members that share a key make a sample.

A member's key is its path up to the first dot of its name. Members of one sample usually follow each other, but any
order within a window is taken. A tar without its end marker is truncated: what came before is kept, the loss is told.
"""

from __future__ import annotations

import gzip
import json
import lzma
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import fsspec

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    IMAGE_SUFFIXES,
    Locator,
    Lost,
    ReadBytes,
    Sample,
    clean_text,
    expand,
    filesystem,
    is_hidden,
    read_pairs,
)

WINDOW = 256  # keys that wait for more members
BLOCK = 512
BROKEN = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
TEXTS = ("txt", "caption", "text", "json", "cls")


class TailReader:
    """A stream that remembers the last bytes it gave, so that the end of the archive can be looked at afterwards.

    What a broken compressed stream still gives before it breaks is given; the error comes with the next read.
    """

    KEPT = 4 * tarfile.RECORDSIZE

    def __init__(self, stream: Any) -> None:
        self._take = getattr(stream, "read1", stream.read)
        self.tail, self.position = b"", 0
        self._error: Exception | None = None

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        left = size
        while left and self._error is None:
            try:
                part = self._take(left)
            except BROKEN as error:
                self._error = error
                break
            if not part:
                break
            parts.append(part)
            left -= len(part)
        if not parts and self._error is not None:
            raise self._error
        data = b"".join(parts)
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
    """What has come of one key: texts by extension, and images as (extension, locator, bytes)."""

    images: list[tuple[str, Locator, bytes]] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class TarGroup:
    """One tar file, plain or compressed (.gz, .bz2, .xz, .zst by name)."""

    path: str
    caption_column: str = "caption"
    label_column: str = "label"

    @property
    def source(self) -> str:
        return self.path

    def samples(self) -> Iterator[Sample | Lost]:
        waiting: OrderedDict[str, _Members] = OrderedDict()
        torn: str | None = None
        with self._open() as stream:
            walk = _TarWalk(TailReader(stream))
            for name, offset, data in walk.members():
                key, extension = split_name(name)
                if extension not in TEXTS and not is_image(extension):
                    continue
                members = waiting.setdefault(key, _Members())
                if is_image(extension):
                    members.images.append((extension, (offset, len(data)), data))
                else:
                    members.texts[extension] = data
                if len(waiting) > WINDOW:
                    yield self._sample(*waiting.popitem(last=False))
            torn = walk.torn
        if torn is not None and walk.torn_member is not None:
            key = split_name(walk.torn_member)[0]
            if waiting.pop(key, None) is not None:
                yield Lost(key, "truncated_tar", f"its member {walk.torn_member} is cut off")
        for key, members in waiting.items():
            yield self._sample(key, members)
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
        compression = "gzip" if self.path.endswith(".tgz") else "infer"
        with fsspec.open(self.path, "rb", compression=compression) as stream:
            yield cast(BinaryIO, stream)

    def _sample(self, key: str, members: _Members) -> Sample | Lost:
        """The sample of a key, or why there is none. Of several images the one with a plain extension comes first."""
        if not members.images:
            return Lost(key, "no_image", f"members: {', '.join(sorted(members.texts))}")
        _, locator, data = min(members.images, key=lambda image: image[0].count("."))
        record: dict[str, Any] = {}
        try:
            if "json" in members.texts:
                loaded = json.loads(members.texts["json"])
                record = loaded if isinstance(loaded, dict) else {}
            qa = read_pairs(record)
        except (ValueError, TypeError) as error:
            return Lost(key, "bad_metadata", f"{key}.json: {error}")
        texts = [members.texts.get(name) for name in ("txt", "caption", "text")]
        captions = [*texts, record.get(self.caption_column), record.get("text")]
        caption = next((text for text in map(clean_text, captions) if text), None)
        label = clean_text(record.get(self.label_column)) or clean_text(members.texts.get("cls"))
        return Sample(key, locator, data, caption, label, qa)


class _TarWalk:
    """Members of a tar stream in order; `torn` says afterwards what is wrong with its end, `torn_member` where."""

    def __init__(self, stream: TailReader) -> None:
        self.stream = stream
        self.torn: str | None = None
        self.torn_member: str | None = None

    def members(self) -> Iterator[tuple[str, int, bytes]]:
        """(name, offset of the data, data) of each regular, unhidden file."""
        name: str | None = None
        try:
            with tarfile.open(fileobj=cast(Any, self.stream), mode="r|") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                    name = info.name
                    if not info.isreg() or is_hidden(info.name.removeprefix("./")):
                        continue
                    file = tar.extractfile(info)
                    assert file is not None
                    data = file.read()
                    if len(data) < info.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield info.name, info.offset_data, data
                    name = None
                end = self.stream.block(tar.offset)
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
    """A group for each tar that a path, pattern or folder names."""
    fs, inside = filesystem(source) if "{" not in source else (None, "")
    if fs is not None and fs.isdir(inside):
        paths = [str(fs.unstrip_protocol(path)).removeprefix("file://") for path in sorted(fs.find(inside))]
        paths = [path for path in paths if is_tar(path)]
        if not paths:
            raise DataError(f"corpus.source: no tar lies in {source}. Name tars, or set corpus.format.")
    else:
        paths = expand(source)
    return [TarGroup(path, section.caption_column, section.label_column) for path in paths]


def is_tar(path: str) -> bool:
    """Whether a name is a tar's, plain or compressed."""
    return path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
