"""What every source of images gives: groups, the units of reading; a group gives samples and what it could not use.

A group is a small, picklable record. `samples` reads it once, in order; every thing in it that stands for an image
comes out exactly once, as a `Sample` or as a `Lost`. `reader` gives the bytes of a sample again by its locator, so that
shards can be written after duplicates and the split are known, without holding the images in between.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar, cast

import fsspec
import pyarrow as pa
from fsspec.compression import compr
from fsspec.implementations.local import LocalFileSystem

from smalti import storage
from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.pipeline.timings import HERE
from smalti.workflows.sources.network import BUFFER_BYTES, RetryingFiles, RetryingStream, retry_network

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".avif",
    ]
)
CAPTION_NAMES = ("text", "TEXT")  # where the column of captions is not there
DEFAULT_CAPTION, DEFAULT_LABEL = (CorpusSection.model_fields[f"{name}_column"].default for name in ("caption", "label"))
IMG2DATASET = frozenset(["key", "status"])  # columns of each of its tables
OPEN_AT_ONCE = 16
T = TypeVar("T")
Locator = tuple[int, int]
ReadBytes = Callable[[Locator], bytes]
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sample:
    """One image as found: encoded bytes and what is said about it. `locator` finds the bytes again in its group."""

    key: str
    locator: Locator
    data: bytes
    caption: str | None = None
    label: str | None = None
    qa: Pairs = ()


@dataclass(frozen=True)
class Lost:
    """Something that stands for an image (or for an unknown number of them) and cannot be used."""

    key: str
    reason: str
    detail: str


class Group(Protocol):
    """A unit of reading; `source` names it for people (a path or URL).

    `in_order`: its reader comes to a place only past all that lies before it (a compressed tar, a row group).
    """

    @property
    def source(self) -> str: ...

    @property
    def in_order(self) -> bool: ...

    def samples(self) -> Iterator[Sample | Lost]: ...

    def reader(self) -> AbstractContextManager[ReadBytes]: ...


def clean_text(value: Any) -> str | None:
    """Text with single spaces; None for nothing: null, NaN, empty. A list gives its first text (several captions), a
    mapping its `text` or `caption`."""
    if isinstance(value, Mapping):
        return clean_text([value.get("text"), value.get("caption")])
    if isinstance(value, list | tuple):
        return next((text for text in map(clean_text, value) if text), None)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = as_text(value) if isinstance(value, bytes) else str(value)
    return printable(" ".join(text.split())) or None


def caption_names(column: str) -> tuple[str, ...]:
    """Where a record may hold a caption: in the column that is named; where none is, in others too."""
    return (column, *CAPTION_NAMES) if column == DEFAULT_CAPTION else (column,)


def as_text(data: bytes) -> str:
    """A text file's content: UTF-8, or UTF-16 where its byte order mark says so; what does not decode is marked."""
    return data.decode(text_encoding(data), errors="replace")


def text_encoding(start: bytes) -> str:
    """The encoding of a text file that begins with these bytes, two at least: see `as_text`."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def printable(text: str) -> str:
    """`text` as UTF-8 can hold it: halves of surrogate pairs (in JSON, in file names of another encoding) become `?`."""
    return text.encode("utf-8", errors="replace").decode()


def load_json(text: str | bytes) -> Any:
    """The value that a JSON text holds. Errors: ValueError for any text that is none, one nested too deep included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deep") from error


def read_pairs(record: Mapping[str, Any]) -> Pairs:
    """Question-answer pairs of a record: `qa` as a list (or the JSON text of one) of {question, answer} or of two texts,
    and `question` with `answer`, where there are both (texts, or lists of one length). A pair without a text on one side
    is left out, and counted. Errors: ValueError when they cannot be read so."""
    found: list[tuple[Any, Any]] = []
    listed = record.get("qa")
    if isinstance(listed, str):
        listed = load_json(listed) if listed.strip() else []
    for item in listed or []:
        if isinstance(item, Mapping):
            found.append((item.get("question"), item.get("answer")))
        elif isinstance(item, list | tuple) and len(item) == 2:
            found.append((item[0], item[1]))
        else:
            raise ValueError(f"qa holds {item!r}; expected {{question, answer}}")
    if record.get("question") is not None and "answer" in record:
        question, answer = record["question"], record["answer"]
        if isinstance(question, list | tuple) and isinstance(answer, list | tuple):
            found += zip(question, answer, strict=True)
        else:
            found.append((question, answer))
    pairs = [(clean_text(question), clean_text(answer)) for question, answer in found]
    whole = tuple((question, answer) for question, answer in pairs if question and answer)
    HERE.count("half_pairs", len(pairs) - len(whole))
    return whole


def suffix(path: str) -> str:
    """`.jpg` of `a/b.JPG`; empty without one."""
    name = path.rsplit("/", 1)[-1]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def bare(path: str) -> str:
    """A path, or a URL without the query behind a web address."""
    return path.partition("?")[0] if is_web(path) else path


def named(path: str) -> str:
    """`bare`, in lower case: what its name tells of the file."""
    return bare(path).lower()


def is_web(path: str) -> bool:
    """Whether a path is a web address."""
    return path.startswith(("http://", "https://"))


def filesystem(path: str, pauses: Sequence[float] | None = None) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it; one on a network is asked again (see `retry_network`).

    Errors: DataError, a scheme that nothing here reads.
    """
    try:
        fs, inside = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"{path} cannot be opened: {error}. Install the package that reads it (s3fs for s3://, gcsfs for gs://), or "
            "name a local path."
        ) from error
    return (fs if storage.is_local(path) else RetryingFiles(fs, path, pauses)), inside


@contextmanager
def open_seekable(path: str, compression: str | None = None) -> Iterator[BinaryIO]:
    """A file of any file system, to be read at any place. What a server gives only from its beginning (HTTP without byte
    ranges) is copied to the local disk first."""
    fs, inside = filesystem(path)
    with ExitStack() as stack:
        stream = stack.enter_context(fs.open(inside, "rb"))
        if is_web(path) and not retry_network(path, _has_ranges, stream):
            copy = stack.enter_context(tempfile.TemporaryFile())
            retry_network(path, _copy, fs, inside, copy)
            stream = copy
        elif not storage.is_local(path):
            raw = stack.enter_context(RetryingStream(stream, path))
            stream = stack.enter_context(io.BufferedReader(raw, BUFFER_BYTES))
        if compression is not None:
            stream = stack.enter_context(compr[compression](stream, mode="rb"))
        yield cast(BinaryIO, stream)


def _copy(fs: Any, path: str, copy: BinaryIO) -> None:
    """All of a file that can only be read from its beginning, in place of what the copy held."""
    copy.seek(0)
    copy.truncate()
    with fs.open(path, "rb", block_size=0) as stream:
        shutil.copyfileobj(stream, copy)
    copy.seek(0)


def read_file(fs: Any, path: str) -> bytes:
    """A file's bytes. Errors: OSError."""
    check_ends(fs, path)
    return cast(bytes, fs.cat_file(path))


def check_ends(fs: Any, path: str) -> None:
    """PermissionError for what is no file and may have no end, a pipe or a device."""
    if isinstance(fs, LocalFileSystem) and fs.info(path)["type"] == "other":
        raise PermissionError(f"{path} is a pipe or a device")


def is_of_file(error: OSError) -> bool:
    """Whether an error is of one file, and not of the disk or the connection."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG)


def is_arrows(error: Exception) -> bool:
    """Whether Arrow itself raised an error, which tells of damage: it has a bare OSError too, and no system error is one."""
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _has_ranges(stream: Any) -> bool:
    """Whether a server gives the last byte of a file alone."""
    try:
        stream.seek(max(0, stream.size - 1))
        stream.read(1)
        stream.seek(0)
    except (ValueError, TypeError, AttributeError):  # fsspec's answers to a server without ranges, or without a length
        return False
    return True


def too_large(key: str, size: int, limit: int) -> Lost:
    """The loss of a member whose bytes are not even read."""
    return Lost(key, "too_large", f"{size:,} bytes, and corpus.max_bytes is {limit:,}")


def of_each(function: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """The function of each path, in order; several at once, since opening a file of a store is waiting."""
    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        return list(pool.map(function, paths))
