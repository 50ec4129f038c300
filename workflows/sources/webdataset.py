"""Source `webdataset`: tars, streamed and never extracted.

Members that share a key form a sample; the key is the path up to the first dot of the name. Members
of one sample usually follow each other; any other order is supported too (see `_Far`). A tar
without its end marker is truncated: the samples before the end are kept, and the truncation is
listed in quarantine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

from fsspec.compression import available_compressions
from fsspec.utils import infer_compression

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.pipeline.timings import PROCESS_TALLY
from smalti.workflows.sources.base import (
    DEFAULT_CAPTION,
    IMAGE_SUFFIXES,
    Locator,
    ReadBytes,
    Sample,
    Unusable,
    caption_names,
    clean_text,
    load_json,
    named,
    open_seekable,
    read_pairs,
    too_large,
)
from smalti.workflows.sources.listing import find_files
from smalti.workflows.sources.tar_walk import Member, TailReader, TarWalk, headers

WINDOW = 256  # keys that may get more members
WINDOW_BYTES = 400_000_000  # of all such keys; the last one stays whatever its size
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
SHORT = {".tgz": "gzip", ".tbz2": "bz2", ".txz": "xz", ".tzst": "zstd"}
TEXTS = ("txt", "caption", "text", "json", "cls")


@dataclass
class _Members:
    """Members of one key so far.

    Of its images the first with the fewest dots in its extension is held; `more` names others with
    as few.
    """

    image: tuple[str, str, Locator, bytes] | None = None  # name, extension, place, bytes
    more: list[str] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    large: bool = False

    def add(self, extension: str, member: Member) -> None:
        """Add a member; of two texts with one extension the first is kept."""
        if is_image(extension) and member.data is not None:
            if self.image is None or self.would_take(extension):
                self.image = (
                    member.name,
                    extension,
                    (member.offset, len(member.data)),
                    member.data,
                )
                self.more = []
            elif extension.count(".") == self.image[1].count("."):
                self.more.append(member.name)
        elif extension in TEXTS and member.data is not None:
            self.texts.setdefault(extension, member.data)
        else:
            self.others.add(f"{extension} ({member.what})" if member.what else extension)

    def would_take(self, extension: str) -> bool:
        """Whether an image of this extension would replace the current one."""
        return self.image is None or (
            is_image(extension) and extension.count(".") < self.image[1].count(".")
        )

    @property
    def num_bytes(self) -> int:
        return (len(self.image[3]) if self.image else 0) + sum(map(len, self.texts.values()))


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

    def samples(self) -> Iterator[Sample | Unusable]:
        waiting: OrderedDict[str, _Members] = OrderedDict()
        held = 0  # bytes
        far = _Far(self)
        with self._open() as stream:
            walk = TarWalk(TailReader(stream), self.max_bytes)
            for member in walk.members():
                key, extension = split_name(member.name)
                members = waiting.setdefault(key, _Members())
                if is_image(extension) and member.size > self.max_bytes:
                    yield too_large(member.name, member.size, self.max_bytes)
                    members.large = True
                else:
                    held -= members.num_bytes
                    members.add(extension, member)
                    held += members.num_bytes
                while len(waiting) > WINDOW or (held > WINDOW_BYTES and len(waiting) > 1):
                    far.passed = True
                    key, members = waiting.popitem(last=False)
                    held -= members.num_bytes
                    yield from self._samples(key, members, far)
        if walk.torn_member is not None:
            key, extension = split_name(walk.torn_member)
            if key in waiting and waiting[key].would_take(extension):
                del waiting[key]  # its image is cut off, which is listed below; or it has none
        for key, members in waiting.items():
            yield from self._samples(key, members, far)
        if walk.torn is not None:
            yield Unusable(walk.torn_member or "", "truncated_tar", walk.torn)

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

    def _samples(self, key: str, members: _Members, far: _Far) -> Iterator[Sample | Unusable]:
        """Yield the sample of a key, or why there is none.

        Of several images the first with the fewest dots in its extension is used. One with more
        (`a.mask.png`) is not a sample of its own; one with as few is reported as `second_image`.
        """
        far.complete(key, members)
        if members.image is None:
            if members.large or (members.texts and far.has_image(key)):
                return  # counted already, or with its image
            there = sorted(members.others.union(members.texts))
            yield Unusable(
                key,
                "no_image",
                f"members: {', '.join(name or 'one without extension' for name in there)}",
            )
            return
        name, _, locator, data = members.image
        yield self._sample(key, locator, data, members)
        for other in members.more:
            yield Unusable(
                other,
                "second_image",
                f"it has the key of {name}: a key ends at the first dot of the name",
            )

    def _sample(
        self, key: str, locator: Locator, data: bytes, members: _Members
    ) -> Sample | Unusable:
        record: dict[str, object] = {}
        try:
            if "json" in members.texts:
                loaded = load_json(members.texts["json"])
                record = loaded if isinstance(loaded, dict) else {}
            qa = read_pairs(record)
        except (ValueError, TypeError) as error:
            return Unusable(key, "bad_metadata", f"{key}.json: {error}")
        texts = [members.texts.get(name) for name in ("txt", "caption", "text")]
        said = [record.get(name) for name in caption_names(self.caption_column)]
        caption = clean_text(
            [*texts, *said] if self.caption_column == DEFAULT_CAPTION else [*said, *texts]
        )
        label = clean_text(record.get(self.label_column)) or clean_text(members.texts.get("cls"))
        return Sample(key, locator, data, caption, label, qa)


class _Far:
    """Finds texts that are further from their image than the window.

    For example, a tar may hold all images, then all texts. When the first key is incomplete within
    the window, the tar's headers are read once. Memory then holds, per key, the positions of its
    texts (their bytes if the tar is compressed, which allows no seeking) and the position of its
    image. Until then it costs nothing.
    """

    def __init__(self, group: TarGroup) -> None:
        self.group = group
        self.texts: dict[str, list[tuple[str, Locator, bytes | None]]] | None = None
        self.images: dict[str, int] = {}  # their offsets
        self.passed = False  # whether the window was full
        self.given = -1  # offset of the last image that was yielded
        self.given_before = -1  # the same at the time the headers were read

    def complete(self, key: str, members: _Members) -> None:
        """Add the texts of a key from outside the window."""
        if (
            self.passed
            and self.texts is None
            and (members.image is not None) != bool(members.texts)
        ):
            self.given_before = self.given
            self._scan()
        self.given = members.image[2][0] if members.image else self.given
        far = [one for one in (self.texts or {}).get(key, ()) if one[0] not in members.texts]
        if not far or members.image is None:
            return
        with self.group.reader() as read:
            for extension, locator, data in far:
                members.texts.setdefault(extension, read(locator) if data is None else data)

    def has_image(self, key: str) -> bool:
        """Whether the tar has an image of this key.

        If the image was yielded before the headers were read, the texts are too late: they are
        counted.
        """
        PROCESS_TALLY.count("late_texts", int(-1 < self.images.get(key, -1) <= self.given_before))
        return key in self.images

    def _scan(self) -> None:
        self.texts = {}
        with self.group._open() as stream:
            if compression_of(self.group.path) is None:
                found = headers(stream)
            else:
                found = TarWalk(TailReader(stream), self.group.max_bytes).members()
            for one in found:
                key, extension = split_name(one.name)
                if is_image(extension) and not one.what:
                    self.images.setdefault(key, one.offset)
                elif extension in TEXTS and one.size <= self.group.max_bytes and not one.what:
                    self.texts.setdefault(key, []).append(
                        (extension, (one.offset, one.size), one.data)
                    )


def is_image(extension: str) -> bool:
    """Whether an extension (`jpg`, `left.png`) is that of an image."""
    return "." + extension.rsplit(".", 1)[-1] in IMAGE_SUFFIXES


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as in WebDataset: `a/b.left.PNG` → (`a/b`, `left.png`)."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def tar_groups(source: str, section: CorpusSection, seed: int) -> list[TarGroup]:
    """One group per tar of a path, pattern or folder.

    Raises:
        DataError: if there is none, or a package for its compression is missing.
    """
    paths = find_files(source, is_tar, "tar")
    for path in paths:
        compression_of(path)
    return [
        TarGroup(path, section.caption_column, section.label_column, section.max_bytes)
        for path in paths
    ]


def compression_of(path: str) -> str | None:
    """fsspec's name of the compression, by the file's name.

    Raises:
        DataError: if the package for it is missing.
    """
    name = named(path)
    if name.endswith((".zst", ".tzst")) and "zstd" not in available_compressions():
        raise DataError(
            f"corpus.source: reading {path} needs the package zstandard. Run `pip install "
            "zstandard`."
        )
    return SHORT.get(name[name.rfind(".") :]) or infer_compression(name)


def is_tar(path: str) -> bool:
    """Whether a name is that of a tar, plain or compressed."""
    return named(path).endswith(TARS)
