"""Source `folder`: images below a folder.

Texts come from a `.txt` beside the image, from `metadata.jsonl`/`.csv`, or from class folders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import BinaryIO, TypeVar

from smalti import storage
from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    IMAGE_SUFFIXES,
    Group,
    Locator,
    Pairs,
    ReadBytes,
    Sample,
    Unusable,
    check_ends,
    clean_text,
    filesystem,
    is_of_file,
    open_seekable,
    printable,
    read_file,
    suffix,
    too_large,
)
from smalti.workflows.sources.listing import SideTables, each_file
from smalti.workflows.sources.metadata import METADATA, Metadata, composed
from smalti.workflows.sources.network import Files
from smalti.workflows.sources.sorted_records import Record, SortedRecords

T = TypeVar("T")
TEXT_SUFFIXES = (".txt", ".caption")  # if both exist, .txt is used
SIDECARS = frozenset([*TEXT_SUFFIXES, ".json", ".jsonl", ".csv", ".md", ".yaml", ".yml", ".html"])


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file and its texts; `text` is the path of its caption file."""

    path: str
    text: str | None = None
    caption: str | None = None
    label: str | None = None
    qa: Pairs = ()


@dataclass(frozen=True)
class FolderGroup:
    """Some files of a folder."""

    root: str
    entries: tuple[Entry, ...]
    lost: tuple[Unusable, ...] = ()
    max_bytes: int = 200_000_000

    @property
    def in_order(self) -> bool:
        return False

    @property
    def source(self) -> str:
        return self.root

    def samples(self) -> Iterator[Sample | Unusable]:
        yield from self.lost
        fs, inside = filesystem(self.root)
        for index, entry in enumerate(self.entries):
            caption = entry.caption
            try:
                size = fs.size(f"{inside}/{entry.path}")
                if size is not None and size > self.max_bytes:
                    yield too_large(entry.path, size, self.max_bytes)
                    continue
                data = read_file(fs, f"{inside}/{entry.path}")
                if caption is None and entry.text is not None:
                    caption = self._text(fs, f"{inside}/{entry.text}")
            except OSError as error:
                if not is_of_file(error):
                    raise
                yield Unusable(entry.path, "unreadable", f"{type(error).__name__}: {error}")
                continue
            yield Sample(
                entry.path, (index, 0), data, caption or entry.label, entry.label, entry.qa
            )

    def _text(self, fs: Files, path: str) -> str | None:
        """The text of a file; None if a local file is over `max_bytes`."""
        if storage.is_local(self.root) and fs.size(path) > self.max_bytes:
            return None
        return clean_text(read_file(fs, path))

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        fs, inside = filesystem(self.root)

        def read(locator: Locator) -> bytes:
            return fs.cat_file(f"{inside}/{self.entries[locator[0]].path}")

        yield read


def folder_groups(source: str, section: CorpusSection, seed: int) -> Iterator[FolderGroup]:
    """Groups of `shard_images` images; then unusable files in groups of the same size.

    Files are ordered by a hash of their relative paths: a listing is sorted by class folder, and
    shards of one class make poor training batches. A class label is the name of the folder that
    holds the image; labels are used if every image lies in a subfolder and there are at least two
    of them. An image with a label and no caption gets the label as its caption. The listing is
    sorted on disk, so that memory grows only with the number of folders.

    Raises:
        DataError: if the folder is missing.
    """
    root = source.rstrip("/") or "/"
    fs, inside = filesystem(root)
    if not fs.isdir(inside):
        raise DataError(
            f"corpus.source: {source} is not a folder. Name a folder of images, or set "
            "corpus.format."
        )
    listing = _Listing(section, root)
    listing.list_files()
    for name in sorted(listing.metadata):
        check_ends(fs, f"{inside}/{name}")
        with open_seekable(storage.join(root, name)) as stream:
            listing.read_metadata(name, stream)
    listing.said.check()
    for entries in batched(listing.entries(), section.shard_images):
        yield FolderGroup(root, entries, (), section.max_bytes)
    for lost in batched((Unusable(*record[2:]) for record in listing.lost), section.shard_images):
        yield FolderGroup(root, (), lost)


TEXT, ROW, IMAGE = range(3)  # records of a stem, in this order
FOLDER, FILE, BAD_ROW, MISSING = range(4)  # unusable entries, in this order


class _Listing:
    """Files of a folder by stem, the path without suffix.

    The stem joins an image with its caption file and its rows of metadata.
    """

    def __init__(self, section: CorpusSection, root: str) -> None:
        self.root = root
        self.said = Metadata(section, root)
        self.rows = 0
        self.by_stem = SortedRecords()
        self.lost = SortedRecords()
        self.metadata: list[str] = []
        self.tables = SideTables(root)
        self.side = set[str]()
        self.classes: set[str] = set()  # two at most
        self.bare = False  # whether an image lies in no subfolder

    def list_files(self) -> None:
        """Add the names of all files."""
        lost: list[Unusable] = []
        for name in each_file(self.root, lost):
            kind = suffix(name)
            self.tables.meet(name)
            if kind in IMAGE_SUFFIXES:
                self.by_stem.add([composed(name[: -len(kind)]), IMAGE, name])
                self.bare |= "/" not in name
                if len(self.classes) < 2 and "/" in name:
                    self.classes.add(_class_of(name))
            elif kind not in SIDECARS and not name.endswith(".parquet"):
                self._not_an_image(name)
            elif kind in TEXT_SUFFIXES:
                self.by_stem.add([composed(name[: -len(kind)]), TEXT, name])
            if name.rsplit("/", 1)[-1].lower() in METADATA:
                self.metadata.append(name)
        self.side = self.tables.found()
        for name in self.tables.tables:
            if name not in self.side:
                self._not_an_image(name)
        for number, one in enumerate(lost):
            self.lost.add([FOLDER, number, one.key, one.reason, one.detail])

    def _not_an_image(self, name: str) -> None:
        detail = f"the suffix {suffix(name)!r} is not one of a supported image format"
        self.lost.add([FILE, name, name, "not_an_image", detail])

    def read_metadata(self, name: str, stream: BinaryIO) -> None:
        """Add the rows of one metadata file."""
        for row in self.said.read(name, stream):
            self.rows += 1
            if isinstance(row, Unusable):
                self.lost.add([BAD_ROW, self.rows, row.key, row.reason, row.detail])
            else:
                stem = row.path[: -len(suffix(row.path))] if suffix(row.path) else row.path
                self.by_stem.add(
                    [stem, ROW, self.rows, row.path, row.where, row.caption, row.label, row.qa]
                )

    def entries(self) -> Iterator[Entry]:
        """Yield the images with their texts, in order.

        Rows of metadata on missing files are added to `lost`.
        """
        ordered = SortedRecords()
        for _, records in groupby(self.by_stem, lambda record: record[0]):
            for entry in self._of_stem(records):
                digest = hashlib.sha256(entry.path.encode(errors="surrogateescape")).hexdigest()
                ordered.add([digest, entry.path, entry.text, entry.caption, entry.label, entry.qa])
        for _, *record in ordered:
            yield _entry(record)

    def _of_stem(self, records: Iterator[Record]) -> Iterator[Entry]:
        """Entries of a stem; further rows on an image add questions and fill empty texts."""
        text: str | None = None
        said: dict[
            str, tuple[Entry, int, str]
        ] = {}  # path as composed → texts, number and position of the first row
        there = set()
        for _, kind, *record in records:
            if kind == TEXT:
                text = record[0]
            elif kind == ROW:
                number, path, where, caption, label, qa = record
                old, first, first_where = said.get(path, (Entry(path), number, where))
                entry = Entry(
                    path, None, old.caption or caption, old.label or label, (*old.qa, *qa)
                )
                said[path] = entry, first, first_where
            else:
                path = composed(record[0])
                there.add(path)
                entry = said[path][0] if path in said else Entry(path)
                label = entry.label if entry.label is not None else self._label(record[0])
                yield replace(entry, path=record[0], text=text, label=label)
        for path, (_, number, where) in said.items():
            if path not in there:
                self.lost.add(
                    [MISSING, number, path, "missing", f"{where} names it, but it does not exist"]
                )

    def _label(self, name: str) -> str | None:
        """The class of an image, if folders are classes; img2dataset's are not."""
        if self.bare or len(self.classes) < 2 or self.side:
            return None
        return " ".join(printable(_class_of(name)).replace("_", " ").split())


def _entry(record: Record) -> Entry:
    """An entry from its JSON record."""
    path, text, caption, label, qa = record
    return Entry(path, text, caption, label, tuple((question, answer) for question, answer in qa))


def _class_of(name: str) -> str:
    return name.rsplit("/", 2)[-2]


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yield the items in tuples of `size`."""
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch


@dataclass(frozen=True)
class ListedGroup:
    """A folder group whose record lies in a file, so that it is small to send."""

    source: str
    listing: str
    in_order: bool = False

    def load(self) -> FolderGroup:
        record = storage.read_json(self.listing)
        entries = map(_entry, record["entries"])
        lost = (Unusable(*one) for one in record["lost"])
        return FolderGroup(record["root"], tuple(entries), tuple(lost), record["max_bytes"])

    def samples(self) -> Iterator[Sample | Unusable]:
        return self.load().samples()

    def reader(self) -> AbstractContextManager[ReadBytes]:
        return self.load().reader()


def listed(group: Group, path: str) -> Group:
    """The group; for a folder, one whose record is written to `path`."""
    if not isinstance(group, FolderGroup):
        return group
    entries = [[one.path, one.text, one.caption, one.label, one.qa] for one in group.entries]
    lost = [[one.key, one.reason, one.detail] for one in group.lost]
    record = {"root": group.root, "entries": entries, "lost": lost, "max_bytes": group.max_bytes}
    # ASCII: also holds names that are not UTF-8
    storage.write_atomic(path, json.dumps(record).encode())
    return ListedGroup(group.root, path)
