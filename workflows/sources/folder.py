"""A folder of images, recursive: text from a `.txt` beside the image, from `metadata.jsonl`/`.csv`, or class folders."""

from __future__ import annotations

import csv
import hashlib
import io
import json
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
    clean_text,
    filesystem,
    is_hidden,
    read_pairs,
    suffix,
)

SIDECARS = frozenset([".txt", ".json", ".jsonl", ".csv", ".md", ".yaml", ".yml", ".html"])
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
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

    @property
    def source(self) -> str:
        return self.root

    def samples(self) -> Iterator[Sample | Lost]:
        yield from self.lost
        fs, inside = filesystem(self.root)
        for index, entry in enumerate(self.entries):
            try:
                data = fs.cat_file(f"{inside}/{entry.path}")
            except (PermissionError, FileNotFoundError) as error:
                yield Lost(entry.path, "unreadable", f"{type(error).__name__}: {error}")
                continue
            caption = entry.caption
            if caption is None and entry.text is not None:
                caption = clean_text(fs.cat_file(f"{inside}/{entry.text}").decode("utf-8-sig", errors="replace"))
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
    skip = len(inside.rstrip("/")) + 1
    names = [path[skip:] for path in fs.find(inside)]
    names = [name for name in names if not is_hidden(name)]
    images = {name for name in names if suffix(name) in IMAGE_SUFFIXES}
    lost = [
        Lost(name, "not_an_image", f"the suffix {suffix(name)!r} is none of an image that can be read")
        for name in sorted(set(names) - images)
        if suffix(name) not in SIDECARS
    ]
    said = _Metadata(section)
    for name in sorted(names):
        if name.rsplit("/", 1)[-1] in METADATA:
            said.read(name, fs.cat_file(f"{inside}/{name}"))
    lost += said.lost + [
        Lost(name, "missing", f"{where} names it, and it is not there")
        for name, where in said.where.items()
        if name not in images
    ]
    labels = _class_labels(images)
    files = set(names)
    entries = []
    for name in sorted(images, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = name[: -len(suffix(name))] + ".txt"
        entry = said.entries.get(name, Entry(name))
        label = entry.label if entry.label is not None else labels.get(name)
        entries.append(replace(entry, text=text if text in files else None, label=label))
    size = section.shard_images
    groups = [FolderGroup(root, tuple(entries[i : i + size])) for i in range(0, len(entries), size)]
    return [*groups, FolderGroup(root, (), tuple(lost))] if lost else groups


def _class_labels(images: set[str]) -> dict[str, str]:
    """Name → class, when every image lies in a folder and the folders have at least two names; else empty."""
    parents = {name: name.rsplit("/", 2)[-2] for name in images if "/" in name}
    if len(parents) < len(images) or len(set(parents.values())) < 2:
        return {}
    return {name: " ".join(parent.replace("_", " ").split()) for name, parent in parents.items()}


@dataclass
class _Metadata:
    """What the metadata files say: image path → entry; rows that cannot be read are lost."""

    section: CorpusSection
    entries: dict[str, Entry] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)

    def read(self, name: str, data: bytes) -> None:
        """Take in one metadata file; its `file_name`s are relative to its own folder."""
        folder = name.rsplit("/", 1)[0] + "/" if "/" in name else ""
        text = data.decode("utf-8-sig", errors="replace")
        rows: Iterator[tuple[int, Any]]
        if name.endswith(".csv"):
            table = csv.DictReader(io.StringIO(text))
            if table.fieldnames is None or "file_name" not in table.fieldnames:
                raise DataError(f"{name} has no column file_name; it has {table.fieldnames}. Name the images there.")
            rows = enumerate(table, 2)
        else:
            rows = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
        for number, row in rows:
            where = f"{name}:{number}"
            try:
                record = json.loads(row) if isinstance(row, str) else row
                self._add(folder, where, record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.lost.append(Lost(where, "bad_metadata", f"{type(error).__name__}: {error}"))

    def _add(self, folder: str, where: str, record: dict[str, Any]) -> None:
        """One row; a second row on the same image adds its questions and fills what is empty."""
        if isinstance(record.get("qa"), str):
            record = record | {"qa": json.loads(record["qa"]) if record["qa"].strip() else []}
        path = folder + str(record["file_name"]).replace("\\", "/").removeprefix("./")
        old = self.entries.get(path, Entry(path))
        caption = clean_text(record.get(self.section.caption_column)) or clean_text(record.get("text"))
        label = clean_text(record.get(self.section.label_column))
        qa = old.qa + read_pairs(record)
        self.entries[path] = replace(old, caption=old.caption or caption, label=old.label or label, qa=qa)
        self.where.setdefault(path, where)
