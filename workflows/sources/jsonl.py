"""Source `jsonl`: JSON lines with paths of images.

A path is relative to the file, absolute, or a URL. A line may have caption, label and questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from smalti import storage
from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    Locator,
    ReadBytes,
    Sample,
    Unusable,
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
PAUSES_S = (1.0,)  # a list of web addresses has dead hosts: two tries each
OUT_OF_REACH = 20  # consecutive unreachable images: then the network is down, not some hosts


@dataclass(frozen=True)
class JsonLinesGroup:
    """Lines of a file that start in bytes `start` to `end` - 1.

    `first`: number of the first line. Each image is a file of its own: if one is missing in the
    second pass, only that one is dropped (`corpus.write`).
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

    def samples(self) -> Iterator[Sample | Unusable]:
        """Yield the images.

        Raises:
            UnreachedError: if `OUT_OF_REACH` consecutive images are unreachable.
        """
        reach = Reach(self.path)
        with open_seekable(self.path) as stream:
            stream.seek(self.start)
            number = self.first
            position = self.start
            while position < self.end and (line := stream.readline()):
                if line.strip():
                    yield self._sample(str(number), (position, len(line)), line, reach)
                number += 1
                position += len(line)

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        with open_seekable(self.path) as stream:

            def read(locator: Locator) -> bytes:
                stream.seek(locator[0])
                fs, inside = filesystem(
                    self._where(load_json(_text(stream.read(locator[1])))), PAUSES_S
                )
                return fs.cat_file(inside)

            yield read

    def _where(self, record: dict[str, object]) -> str:
        name = next((record[key] for key in (self.image, *IMAGE_NAMES) if record.get(key)), None)
        if not isinstance(name, str):
            raise ValueError(
                f"no path of an image under {self.image}; the keys are {', '.join(record)}"
            )
        return (
            name
            if "://" in name or name.startswith("/")
            else storage.join(storage.parent(bare(self.path)), name)
        )

    def _sample(self, key: str, locator: Locator, line: bytes, reach: Reach) -> Sample | Unusable:
        try:
            record = load_json(_text(line))
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            place = self._where(record)
            qa = read_pairs(record)
        except (ValueError, TypeError) as error:
            return Unusable(key, "bad_metadata", f"line {key}: {error}")
        try:
            fs, inside = filesystem(place, PAUSES_S)
            size = fs.size(inside)
            if size is not None and size > self.max_bytes:
                return too_large(key, size, self.max_bytes)
            data = read_file(fs, inside)
            reach.met()
        except UnreachedError as error:
            reach.missed(place)
            return Unusable(key, "unreachable", str(error))
        except FileNotFoundError:
            reach.met()
            return Unusable(key, "missing", f"line {key} names {place}, which does not exist")
        except (OSError, ValueError, DataError) as error:
            if isinstance(error, OSError) and not is_of_file(error):
                raise
            return Unusable(key, "unreadable", f"{place}: {type(error).__name__}: {error}")
        caption = clean_text([record.get(name) for name in caption_names(self.caption)])
        return Sample(key, locator, data, caption, clean_text(record.get(self.label)), qa)


class Reach:
    """Counts consecutive unreachable images."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.unanswered = 0

    def met(self) -> None:
        """Reset the count: a server answered."""
        self.unanswered = 0

    def missed(self, place: str) -> None:
        """Count an unreachable image.

        Raises:
            UnreachedError: from `OUT_OF_REACH` on.
        """
        self.unanswered += 1
        if self.unanswered >= OUT_OF_REACH:
            raise UnreachedError(
                f"{self.source} names {self.unanswered} unreachable images in a row; the last is "
                f"{place}. Check the network, then run the same command to resume. If their hosts "
                "no longer exist, remove those lines or shuffle the lines."
            )


def _text(line: bytes) -> str:
    return line.decode("utf-8-sig")


def is_jsonl(path: str) -> bool:
    """Whether a name is that of a JSON lines file."""
    return named(path).endswith((".jsonl", ".ndjson"))


def jsonl_groups(source: str, section: CorpusSection, seed: int) -> list[JsonLinesGroup]:
    """Groups of `shard_images` lines of the files of a path or pattern.

    Raises:
        DataError: if there are none.
    """
    groups: list[JsonLinesGroup] = []
    for path in expand(source):
        with open_seekable(path) as stream:
            for first, start, end in _ranges(stream, section.shard_images):
                names = (section.image_column, section.caption_column, section.label_column)
                groups.append(JsonLinesGroup(path, start, end, first, *names, section.max_bytes))
    return groups


def _ranges(stream: BinaryIO, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first line, first byte, end) of each `size` lines; counted from 1."""
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
