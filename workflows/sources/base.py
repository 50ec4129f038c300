"""Interface of all sources: groups, which are the units of reading.

A group is a small, picklable record. `samples` reads it once, in order, and yields each image
exactly once: as a `Sample`, or as a `Unusable` if it cannot be used. `reader` reads the bytes of a
sample again by its locator, so that shards can be written once duplicates and the split are known,
without holding the images in between.
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
from fsspec.spec import AbstractBufferedFile

from smalti import storage
from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.pipeline.timings import PROCESS_TALLY
from smalti.workflows.sources.network import (
    BUFFER_BYTES,
    Files,
    RetryingFiles,
    RetryingStream,
    retry_network,
)

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
CAPTION_NAMES = ("text", "TEXT")  # used if the caption column is missing
DEFAULT_CAPTION, DEFAULT_LABEL = (
    CorpusSection.model_fields[f"{name}_column"].default for name in ("caption", "label")
)
IMG2DATASET = frozenset(["key", "status"])  # columns of each of its tables
OPEN_AT_ONCE = 16
T = TypeVar("T")
Locator = tuple[int, int]
ReadBytes = Callable[[Locator], bytes]
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sample:
    """One image: encoded bytes and its texts.

    `locator`: the position of the bytes in the group.
    """

    key: str
    locator: Locator
    data: bytes
    caption: str | None = None
    label: str | None = None
    qa: Pairs = ()


@dataclass(frozen=True)
class Unusable:
    """An entry (of one image, or an unknown number) that cannot be used."""

    key: str
    reason: str
    detail: str


class Group(Protocol):
    """A unit of reading.

    `source`: its path or URL. `in_order`: whether its reader must read all that precedes a position
    (a compressed tar, a row group).
    """

    @property
    def source(self) -> str: ...

    @property
    def in_order(self) -> bool: ...

    def samples(self) -> Iterator[Sample | Unusable]: ...

    def reader(self) -> AbstractContextManager[ReadBytes]: ...


def clean_text(value: object) -> str | None:
    """Text with single spaces; None for null, NaN or empty.

    Of a list (several captions) the first text; of a mapping its `text` or `caption`.
    """
    if isinstance(value, Mapping):
        return clean_text([value.get("text"), value.get("caption")])
    if isinstance(value, list | tuple):
        return next((text for text in map(clean_text, value) if text), None)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = as_text(value) if isinstance(value, bytes) else str(value)
    return printable(" ".join(text.split())) or None


def caption_names(column: str) -> tuple[str, ...]:
    """Columns that may hold a caption; with the default column, others too."""
    return (column, *CAPTION_NAMES) if column == DEFAULT_CAPTION else (column,)


def as_text(data: bytes) -> str:
    """Decode a text file: UTF-8, or UTF-16 by its byte order mark.

    Bytes that cannot be decoded become U+FFFD.
    """
    return data.decode(text_encoding(data), errors="replace")


def text_encoding(start: bytes) -> str:
    """Encoding of a text file by its first bytes (at least two); see `as_text`."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def printable(text: str) -> str:
    """`text` with lone surrogates replaced by `?`, so that UTF-8 can hold it.

    They occur in JSON, and in file names of another encoding.
    """
    return text.encode("utf-8", errors="replace").decode()


def load_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if the text is not JSON, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deep") from error


def read_pairs(record: Mapping[str, Any]) -> Pairs:
    """Question-answer pairs of a record.

    Read from `qa`, a list (or its JSON text) of {question, answer} or of two texts each; and from
    `question` with `answer`, if both exist (texts, or lists of equal length). A pair with an empty
    side is left out and counted.

    Raises:
        ValueError: if the pairs have another form.
    """
    found: list[tuple[object, object]] = []
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
    PROCESS_TALLY.count("half_pairs", len(pairs) - len(whole))
    return whole


def suffix(path: str) -> str:
    """`.jpg` of `a/b.JPG`; empty if there is none."""
    name = path.rsplit("/", 1)[-1]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def bare(path: str) -> str:
    """The path or URL; a web address without its query."""
    return path.partition("?")[0] if is_web(path) else path


def named(path: str) -> str:
    """`bare` in lower case, to detect the format by name."""
    return bare(path).lower()


def is_web(path: str) -> bool:
    """Whether a path is a web address."""
    return path.startswith(("http://", "https://"))


def filesystem(path: str, pauses: Sequence[float] | None = None) -> tuple[Files, str]:
    """The fsspec file system of a path or URL, and the path in it.

    Calls over a network are retried (see `retry_network`).

    Args:
        pauses: seconds before each further try.

    Raises:
        DataError: if no installed package reads the URL's scheme.
    """
    try:
        fs, inside = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"{path} cannot be opened: {error}. Install the package that reads it (s3fs for s3://, "
            "gcsfs for gs://), or name a local path."
        ) from error
    return (fs if storage.is_local(path) else RetryingFiles(fs, path, pauses)), inside


@contextmanager
def open_seekable(path: str, compression: str | None = None) -> Iterator[BinaryIO]:
    """Open a file of any file system with random access.

    If the server has no byte ranges, the file is first copied to the local disk.
    """
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


def _copy(fs: Files, path: str, copy: BinaryIO) -> None:
    """Copy a whole file; overwrites what an earlier try copied."""
    copy.seek(0)
    copy.truncate()
    with fs.open(path, "rb", block_size=0) as stream:
        shutil.copyfileobj(stream, copy)
    copy.seek(0)


def read_file(fs: Files, path: str) -> bytes:
    """Read a file's bytes."""
    check_ends(fs, path)
    return cast(bytes, fs.cat_file(path))


def check_ends(fs: Files, path: str) -> None:
    """Raise PermissionError for a pipe or a device, which may have no end."""
    if isinstance(fs, LocalFileSystem) and fs.info(path)["type"] == "other":
        raise PermissionError(f"{path} is a pipe or a device")


def is_of_file(error: OSError) -> bool:
    """Whether an error concerns one file, not the disk or the connection."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG)


def is_arrows(error: Exception) -> bool:
    """Whether Arrow raised the error, which means that the file is damaged.

    Arrow also raises OSError without errno; system errors have one.
    """
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _has_ranges(stream: AbstractBufferedFile) -> bool:
    """Whether a server can send the last byte of a file alone."""
    try:
        stream.seek(max(0, stream.size - 1))
        stream.read(1)
        stream.seek(0)
    except (
        ValueError,
        TypeError,
        AttributeError,
    ):  # of fsspec, if the server has no ranges or sends no length
        return False
    return True


def too_large(key: str, size: int, limit: int) -> Unusable:
    """A `Unusable` for a file over the size limit; its bytes are not read."""
    return Unusable(key, "too_large", f"{size:,} bytes, and corpus.max_bytes is {limit:,}")


def of_each(function: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """Map a function over paths, in order, with several threads.

    Opening a file of an object store is mostly waiting.
    """
    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        return list(pool.map(function, paths))
