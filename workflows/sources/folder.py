"""A folder of images, recursive: text from a `.txt` beside the image, from `metadata.jsonl`/`.csv`, or class folders."""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    IMAGE_SUFFIXES,
    Locator,
    Lost,
    Pairs,
    ReadBytes,
    Sample,
    as_text,
    clean_text,
    filesystem,
    list_files,
    load_json,
    printable,
    read_pairs,
    side_tables,
    suffix,
    too_large,
)

SIDECARS = frozenset([".txt", ".json", ".jsonl", ".csv", ".md", ".yaml", ".yml", ".html"])
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file and what the folder says about it; `text` is the path of its caption file."""

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
    lost: tuple[Lost, ...] = ()
    max_bytes: int = 200_000_000

    @property
    def in_order(self) -> bool:
        return False

    @property
    def source(self) -> str:
        return self.root

    def samples(self) -> Iterator[Sample | Lost]:
        yield from self.lost
        fs, inside = filesystem(self.root)
        for index, entry in enumerate(self.entries):
            caption = entry.caption
            try:
                size = fs.size(f"{inside}/{entry.path}")
                if size is not None and size > self.max_bytes:
                    yield too_large(entry.path, size, self.max_bytes)
                    continue
                data = fs.cat_file(f"{inside}/{entry.path}")
                if caption is None and entry.text is not None:
                    caption = clean_text(fs.cat_file(f"{inside}/{entry.text}"))
            except (PermissionError, FileNotFoundError) as error:
                yield Lost(entry.path, "unreadable", f"{type(error).__name__}: {error}")
                continue
            yield Sample(entry.path, (index, 0), data, caption or entry.label, entry.label, entry.qa)

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        fs, inside = filesystem(self.root)

        def read(locator: Locator) -> bytes:
            return fs.cat_file(f"{inside}/{self.entries[locator[0]].path}")

        yield read


def folder_groups(source: str, section: CorpusSection, seed: int) -> list[FolderGroup]:
    """The folder's images in groups of `shard_images`.

    Files come in an order hashed from their relative paths: class folders are sorted by class, and shards of one class
    would make poor training batches. A class label is the name of the folder around an image; it is used when every
    image lies in a folder and there are at least two of them. An image with a label and no caption gets the label as
    its caption. Errors: DataError when the folder is missing.
    """
    root = source.rstrip("/") or "/"
    fs, inside = filesystem(root)
    if not fs.isdir(inside):
        raise DataError(f"corpus.source: {source} is not a folder. Name a folder of images, or set corpus.format.")
    names, lost = list_files(root)
    images = {name for name in names if suffix(name) in IMAGE_SUFFIXES}
    tables = side_tables(names)
    lost += [
        Lost(name, "not_an_image", f"the suffix {suffix(name)!r} is none of an image that can be read")
        for name in names
        if name not in images and suffix(name) not in SIDECARS and name not in tables
    ]
    said = _Metadata(section, root)
    for name in names:
        if name.rsplit("/", 1)[-1].lower() in METADATA:
            said.read(name, fs.cat_file(f"{inside}/{name}"))
    said.check()
    there = {_composed(name) for name in images}
    lost += said.lost + [
        Lost(name, "missing", f"{where} names it, and it is not there")
        for name, where in said.where.items()
        if name not in there
    ]
    labels = {} if tables.intersection(names) else _class_labels(images)  # img2dataset's folders are no classes
    texts = {_composed(name[:-4]): name for name in names if suffix(name) == ".txt"}
    entries = []
    for name in sorted(images, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest()):
        entry = replace(said.entries.get(_composed(name), Entry(name)), path=name)
        label = entry.label if entry.label is not None else labels.get(name)
        entries.append(replace(entry, text=texts.get(_composed(name[: -len(suffix(name))])), label=label))
    size = section.shard_images
    groups = [
        FolderGroup(root, tuple(entries[i : i + size]), (), section.max_bytes) for i in range(0, len(entries), size)
    ]
    return [*groups, FolderGroup(root, (), tuple(lost))] if lost else groups


def _composed(name: str) -> str:
    """A name in Unicode's composed form: some systems take names apart (`e` and an accent), the metadata does not."""
    return unicodedata.normalize("NFC", name)


def _class_labels(images: set[str]) -> dict[str, str]:
    """Name → class, when every image lies in a folder and the folders have at least two names; else empty."""
    parents = {name: name.rsplit("/", 2)[-2] for name in images if "/" in name}
    if len(parents) < len(images) or len(set(parents.values())) < 2:
        return {}
    return {name: " ".join(printable(parent).replace("_", " ").split()) for name, parent in parents.items()}


@dataclass
class _Metadata:
    """What the metadata files say: image path → entry; rows that cannot be read are lost."""

    section: CorpusSection
    root: str
    entries: dict[str, Entry] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Errors: DataError when a column that the recipe names stands in no metadata file, where there is one."""
        for key in ("caption_column", "label_column"):
            name = getattr(self.section, key)
            default = CorpusSection.model_fields[key].default
            if self.columns and name != default and name not in self.columns:
                raise DataError(
                    f"The metadata files of {self.root} have no column {name!r} (corpus.{key}); they have "
                    f"{', '.join(sorted(self.columns))}."
                )

    def read(self, name: str, data: bytes) -> None:
        """Take in one metadata file; its `file_name`s are relative to its own folder."""
        folder = name.rsplit("/", 1)[0] + "/" if "/" in name else ""
        text = as_text(data).replace("\r\n", "\n").replace("\r", "\n")
        for number, row in self._table(name, text) if suffix(name) == ".csv" else _lines(text):
            where = f"{name}:{number}"
            try:
                if isinstance(row, csv.Error):
                    raise row
                self._add(folder, where, load_json(row) if isinstance(row, str) else row)
            except KeyError as error:
                self.lost.append(Lost(where, "bad_metadata", f"the row has no {error}"))
            except (ValueError, TypeError, AttributeError, csv.Error) as error:
                self.lost.append(Lost(where, "bad_metadata", f"{type(error).__name__}: {error}"))

    def _table(self, name: str, text: str) -> Iterator[tuple[int, dict[str, Any] | csv.Error]]:
        """(last line, row) of each row of a CSV; a row that is none, as the error that says why."""
        table = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
        try:
            heads = [head.strip() for head in table.fieldnames or []]
        except csv.Error as error:
            raise DataError(
                f"{self.root}/{name}: its first line, the names of the columns, is no CSV: {error}."
            ) from error
        if "file_name" not in heads:
            raise DataError(
                f"{self.root}/{name} has no column file_name; it has {', '.join(heads) or 'none at all'}. "
                "Name the images there, with commas between the columns."
            )
        table.fieldnames = heads
        while True:
            try:
                row: dict[str, Any] | csv.Error = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                row = error
            yield table.reader.line_num, row

    def _add(self, folder: str, where: str, record: dict[str, Any]) -> None:
        """One row; a second row on the same image adds its questions and fills what is empty."""
        self.columns |= {str(name) for name in record if name is not None}
        if not record["file_name"]:
            raise ValueError("file_name is empty")
        path = _composed(posixpath.normpath(folder + str(record["file_name"]).replace("\\", "/")))
        old = self.entries.get(path, Entry(path))
        caption = clean_text(record.get(self.section.caption_column)) or clean_text(record.get("text"))
        label = clean_text(record.get(self.section.label_column))
        qa = old.qa + read_pairs(record)
        self.entries[path] = replace(old, caption=old.caption or caption, label=old.label or label, qa=qa)
        self.where.setdefault(path, where)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of each line that is not blank; JSON may hold U+2028 and the like, which end no line of a file."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
