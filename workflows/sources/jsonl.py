"""JSON lines that name images: a path relative to the file (or a URL), with caption, label and questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from smalti import storage
from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    Locator,
    Lost,
    ReadBytes,
    Sample,
    clean_text,
    filesystem,
    is_of_file,
    load_json,
    open_seekable,
    read_file,
    read_pairs,
    too_large,
)
from smalti.workflows.sources.listing import expand

IMAGE_NAMES = ("image", "file_name", "path", "url")


@dataclass(frozen=True)
class JsonLinesGroup:
    """The lines of a file that begin from byte `start` up to `end`; `first` is the number of the first of them."""

    path: str
    start: int
    end: int
    first: int
    image: str
    caption: str
    label: str
    max_bytes: int

    @property
    def in_order(self) -> bool:
        return False

    @property
    def source(self) -> str:
        return self.path

    def samples(self) -> Iterator[Sample | Lost]:
        with open_seekable(self.path) as stream:
            stream.seek(self.start)
            number, position = self.first, self.start
            while position < self.end and (line := stream.readline()):
                if line.strip():
                    yield self._sample(str(number), (position, len(line)), line)
                number, position = number + 1, position + len(line)

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        with open_seekable(self.path) as stream:

            def read(locator: Locator) -> bytes:
                stream.seek(locator[0])
                fs, inside = filesystem(self._where(load_json(_text(stream.read(locator[1])))))
                return fs.cat_file(inside)

            yield read

    def _where(self, record: dict[str, Any]) -> str:
        name = next((record[key] for key in (self.image, *IMAGE_NAMES) if record.get(key)), None)
        if not isinstance(name, str):
            raise ValueError(f"no path of an image under {self.image}; the keys are {', '.join(record)}")
        return name if "://" in name or name.startswith("/") else storage.join(storage.parent(self.path), name)

    def _sample(self, key: str, locator: Locator, line: bytes) -> Sample | Lost:
        try:
            record = load_json(_text(line))
            if not isinstance(record, dict):
                raise ValueError("it is no object")
            place, qa = self._where(record), read_pairs(record)
        except (ValueError, TypeError) as error:
            return Lost(key, "bad_metadata", f"line {key}: {error}")
        try:
            fs, inside = filesystem(place)
            size = fs.size(inside)
            if size is not None and size > self.max_bytes:
                return too_large(key, size, self.max_bytes)
            data = read_file(fs, inside)
        except FileNotFoundError:
            return Lost(key, "missing", f"line {key} names {place}, and it is not there")
        except (OSError, ValueError, DataError) as error:
            if isinstance(error, OSError) and not is_of_file(error):
                raise
            return Lost(key, "unreadable", f"{place}: {type(error).__name__}: {error}")
        caption = clean_text(record.get(self.caption)) or clean_text(record.get("text"))
        return Sample(key, locator, data, caption, clean_text(record.get(self.label)), qa)


def _text(line: bytes) -> str:
    return line.decode("utf-8-sig")


def is_jsonl(path: str) -> bool:
    """Whether a name is that of a file of JSON lines."""
    return path.lower().endswith((".jsonl", ".ndjson"))


def jsonl_groups(source: str, section: CorpusSection, seed: int) -> list[JsonLinesGroup]:
    """Groups of `shard_images` lines of the files that a path or pattern names. Errors: DataError when none is found."""
    groups: list[JsonLinesGroup] = []
    for path in expand(source):
        with open_seekable(path) as stream:
            for first, start, end in _ranges(stream, section.shard_images):
                names = (section.image_column, section.caption_column, section.label_column)
                groups.append(JsonLinesGroup(path, start, end, first, *names, section.max_bytes))
    return groups


def _ranges(stream: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """(number of the first line, first byte, end) of each `size` lines; lines are counted from 1."""
    start = position = 0
    number = 1
    for line in stream:
        position += len(line)
        if number % size == 0:
            yield number - size + 1, start, position
            start = position
        number += 1
    if position > start:
        yield (number - 1) // size * size + 1, start, position
