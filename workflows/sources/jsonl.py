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
    bare,
    caption_names,
    clean_text,
    filesystem,
    is_of_file,
    load_json,
    named,
    open_seekable,
    read_file,
    read_pairs,
    too_large,
)
from smalti.workflows.sources.listing import expand
from smalti.workflows.sources.network import UnreachedError

IMAGE_NAMES = ("image", "file_name", "path", "url")
PAUSES_S = (1.0,)  # a list of web addresses has dead hosts: each is asked twice
OUT_OF_REACH = 20  # images in a row that nobody answers for: it is the network, and not some of the hosts


@dataclass(frozen=True)
class JsonLinesGroup:
    """The lines of a file that begin from byte `start` up to `end`; `first` is the number of the first of them.

    Each image lies by itself: one that is gone at the second pass is lost alone (`corpus_write`).
    """

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
        """Errors: UnreachedError when nobody answers for `OUT_OF_REACH` images in a row."""
        reach = Reach(self.path)
        with open_seekable(self.path) as stream:
            stream.seek(self.start)
            number, position = self.first, self.start
            while position < self.end and (line := stream.readline()):
                if line.strip():
                    yield self._sample(str(number), (position, len(line)), line, reach)
                number, position = number + 1, position + len(line)

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        with open_seekable(self.path) as stream:

            def read(locator: Locator) -> bytes:
                stream.seek(locator[0])
                fs, inside = filesystem(self._where(load_json(_text(stream.read(locator[1])))), PAUSES_S)
                return fs.cat_file(inside)

            yield read

    def _where(self, record: dict[str, Any]) -> str:
        name = next((record[key] for key in (self.image, *IMAGE_NAMES) if record.get(key)), None)
        if not isinstance(name, str):
            raise ValueError(f"no path of an image under {self.image}; the keys are {', '.join(record)}")
        return name if "://" in name or name.startswith("/") else storage.join(storage.parent(bare(self.path)), name)

    def _sample(self, key: str, locator: Locator, line: bytes, reach: Reach) -> Sample | Lost:
        try:
            record = load_json(_text(line))
            if not isinstance(record, dict):
                raise ValueError("it is no object")
            place, qa = self._where(record), read_pairs(record)
        except (ValueError, TypeError) as error:
            return Lost(key, "bad_metadata", f"line {key}: {error}")
        try:
            fs, inside = filesystem(place, PAUSES_S)
            size = fs.size(inside)
            if size is not None and size > self.max_bytes:
                return too_large(key, size, self.max_bytes)
            data = read_file(fs, inside)
            reach.met()
        except UnreachedError as error:
            reach.missed(place)
            return Lost(key, "unreachable", str(error))
        except FileNotFoundError:
            reach.met()
            return Lost(key, "missing", f"line {key} names {place}, and it is not there")
        except (OSError, ValueError, DataError) as error:
            if isinstance(error, OSError) and not is_of_file(error):
                raise
            return Lost(key, "unreadable", f"{place}: {type(error).__name__}: {error}")
        caption = clean_text([record.get(name) for name in caption_names(self.caption)])
        return Sample(key, locator, data, caption, clean_text(record.get(self.label)), qa)


class Reach:
    """Counts the images in a row of a list of them that nobody answers for."""

    def __init__(self, source: str) -> None:
        self.source, self.unanswered = source, 0

    def met(self) -> None:
        """Somebody answered."""
        self.unanswered = 0

    def missed(self, place: str) -> None:
        """Nobody did. Errors: UnreachedError from `OUT_OF_REACH` on."""
        self.unanswered += 1
        if self.unanswered >= OUT_OF_REACH:
            raise UnreachedError(
                f"{self.source} names {self.unanswered} images in a row that nobody answers for, the last is {place}. Check "
                "the network, and run the command again: what is done is kept. Where their hosts are gone for good, take "
                "those lines out or mix the lines."
            )


def _text(line: bytes) -> str:
    return line.decode("utf-8-sig")


def is_jsonl(path: str) -> bool:
    """Whether a name is that of a file of JSON lines."""
    return named(path).endswith((".jsonl", ".ndjson"))


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
