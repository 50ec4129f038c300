"""Source `parquet`: files with image bytes.

The image column is binary, or Hugging Face's struct {bytes, path}; columns are found by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    CAPTION_NAMES,
    DEFAULT_CAPTION,
    DEFAULT_LABEL,
    IMG2DATASET,
    Locator,
    ReadBytes,
    Sample,
    Unusable,
    clean_text,
    is_arrows,
    load_json,
    named,
    of_each,
    open_seekable,
    read_pairs,
)
from smalti.workflows.sources.listing import find_files

ROWS_A_BATCH = 128
BUFFER_BYTES = 1 << 20  # read in parts: a row group may be larger than memory
# its Parquet output names the image column by the format
IMG2DATASET_IMAGES = (
    "jpg",
    "png",
    "webp",
)
BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)


@dataclass(frozen=True)
class ParquetGroup:
    """Some row groups of one file.

    `names`: classes of an integer label (Hugging Face's ClassLabel).
    """

    path: str
    row_groups: tuple[int, ...]
    image: str
    caption: str | None
    label: str | None
    pairs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    torn: str | None = None

    @property
    def in_order(self) -> bool:
        return True

    @property
    def source(self) -> str:
        return self.path

    def samples(self) -> Iterator[Sample | Unusable]:
        if self.torn is not None:
            yield Unusable("", "torn_file", self.torn)
            return
        columns = [
            name for name in (self.image, self.caption, self.label, *self.pairs) if name is not None
        ]
        with _open(self.path) as file:
            for number in self.row_groups:
                row = 0
                try:
                    for batch in file.iter_batches(
                        ROWS_A_BATCH, row_groups=[number], columns=columns
                    ):
                        for record in records(batch):
                            yield self._sample(f"{number}:{row}", (number, row), record)
                            row += 1
                except (pa.ArrowException, OSError) as error:
                    if not is_arrows(error):
                        raise
                    for left in range(row, file.metadata.row_group(number).num_rows):
                        yield Unusable(
                            f"{number}:{left}",
                            "torn_file",
                            f"row group {number} cannot be read: {error}",
                        )

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        with _open(self.path) as file:
            yield Batches(
                lambda number: file.iter_batches(
                    ROWS_A_BATCH, row_groups=[number], columns=[self.image]
                )
            ).value

    def _sample(
        self, key: str, locator: Locator, record: dict[str, Any] | Exception
    ) -> Sample | Unusable:
        if isinstance(record, Exception):
            what = (
                "a text is not UTF-8"
                if isinstance(record, UnicodeDecodeError)
                else "a value cannot be read"
            )
            return Unusable(key, "bad_metadata", f"{what}: {record}")
        image = record[self.image]
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is None:
            path = image.get("path") if isinstance(image, dict) else None
            return Unusable(
                key,
                "no_image",
                f"the row holds no bytes{f', only the path {path}' if path else ''}",
            )
        try:
            qa = read_pairs({name: record[name] for name in self.pairs})
        except (ValueError, TypeError) as error:
            return Unusable(key, "bad_metadata", str(error))
        label = record[self.label] if self.label else None
        if self.names and isinstance(label, int):
            # -1: Hugging Face's "no label"
            label = self.names[label] if 0 <= label < len(self.names) else None
        caption = clean_text(record[self.caption]) if self.caption else None
        return Sample(key, locator, bytes(data), caption, clean_text(label), qa)


class Batches:
    """Random access to one column by (part, row), with one batch in memory.

    Reading forward is cheap; reading backward restarts the part.
    """

    def __init__(self, batches: Callable[[int], Iterator[pa.RecordBatch]]) -> None:
        self.batches = batches
        self.part = -1
        self.start = 0
        self.held = pa.array([])
        self.rest: Iterator[pa.RecordBatch] = iter(())

    def value(self, locator: Locator) -> bytes:
        """The image bytes at (part, row).

        Raises:
            EOFError: if the part no longer has this row.
        """
        part, row = locator
        if part != self.part or row < self.start:
            self.part, self.start, self.held, self.rest = part, 0, pa.array([]), self.batches(part)
        while row >= self.start + len(self.held):
            self.start += len(self.held)
            batch = next(self.rest, None)
            if batch is None:
                raise EOFError(f"it has fewer rows than {row + 1}")
            self.held = batch.column(0)
        value = self.held[row - self.start].as_py()
        return value["bytes"] if isinstance(value, dict) else value


def records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """Yield each row, or the error of a row that cannot be decoded.

    Such as a text that is not UTF-8 (not every writer checks), or an invalid date.
    """
    for row in range(len(batch)):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield error


@contextmanager
def _open(path: str) -> Iterator[pq.ParquetFile]:
    with open_seekable(path) as stream, pq.ParquetFile(stream, buffer_size=BUFFER_BYTES) as file:
        yield file


def parquet_groups(source: str, section: CorpusSection, seed: int) -> list[ParquetGroup]:
    """Groups of whole row groups with at least `shard_images` rows.

    Raises:
        DataError: if a column is missing, or the image column cannot hold images.
    """
    paths = find_files(source, is_parquet, "Parquet file")
    return [
        group
        for groups in of_each(partial(_file_groups, section=section), paths)
        for group in groups
    ]


def is_parquet(path: str) -> bool:
    """Whether a name is that of a Parquet file."""
    return named(path).endswith((".parquet", ".pq"))


def _file_groups(path: str, section: CorpusSection) -> list[ParquetGroup]:
    try:
        with _open(path) as file:
            schema = file.schema_arrow
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        if not is_arrows(error):
            raise
        return [
            ParquetGroup(
                path, (), section.image_column, None, None, torn=f"no Parquet footer: {error}"
            )
        ]
    image = image_column(schema, section.image_column)
    check_image(path, schema, image)
    caption = pick_column(
        path, schema, section.caption_column, "caption_column", DEFAULT_CAPTION, CAPTION_NAMES
    )
    label = pick_column(path, schema, section.label_column, "label_column", DEFAULT_LABEL, ())
    pairs = tuple(name for name in ("qa", "question", "answer") if name in schema.names)
    groups: list[ParquetGroup] = []
    numbers: list[int] = []
    rows = 0
    for number, size in enumerate(sizes):
        numbers.append(number)
        rows += size
        if rows >= section.shard_images or number == len(sizes) - 1:
            names = class_names(path, schema, label)
            groups.append(ParquetGroup(path, tuple(numbers), image, caption, label, pairs, names))
            numbers = []
            rows = 0
    return groups


def image_column(schema: pa.Schema, name: str) -> str:
    """The image column: `name`, or img2dataset's if the default is missing."""
    default = CorpusSection.model_fields["image_column"].default
    if name not in schema.names and name == default and IMG2DATASET.issubset(schema.names):
        return next((one for one in IMG2DATASET_IMAGES if one in schema.names), name)
    return name


def check_image(path: str, schema: pa.Schema, name: str) -> None:
    if name not in schema.names:
        raise DataError(
            f"{path} has no column {name!r} with images; its columns are "
            f"{', '.join(schema.names)}. Set corpus.image_column to one of them."
        )
    _check_single(path, schema, name)
    kind = schema.field(name).type
    inner = (
        kind.field("bytes").type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        else kind
    )
    if not any(test(inner) for test in BYTES):
        raise DataError(
            f"{path}: column {name!r} is {kind}; expected encoded image bytes (binary) or a struct "
            f"{{bytes, path}}. The columns are "
            f"{', '.join(f'{field.name}: {field.type}' for field in schema)}."
        )


def _check_single(path: str, schema: pa.Schema, name: str) -> None:
    if (number := schema.names.count(name)) > 1:
        raise DataError(
            f"{path} has {number} columns {name!r}. Write the file again with one, or name another "
            "column."
        )


def pick_column(
    path: str, schema: pa.Schema, name: str, key: str, default: str, others: Sequence[str]
) -> str | None:
    """The column `name`; if it is the missing default, the first of `others` or None."""
    if name in schema.names:
        _check_single(path, schema, name)
        return name
    if name != default:
        raise DataError(
            f"{path} has no column {name!r} (corpus.{key}); its columns are "
            f"{', '.join(schema.names)}."
        )
    return next((other for other in others if other in schema.names), None)


def class_names(path: str, schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """Class names in the schema's metadata by Hugging Face's `datasets`; empty without.

    Raises:
        DataError: if the metadata is malformed.
    """
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None or label is None:
        return ()
    try:
        feature = load_json(raw).get("info", {}).get("features", {}).get(label)
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: the metadata `huggingface` of its schema cannot be read "
            f"({type(error).__name__}: {error}), and it names the classes of the column {label!r}. "
            "Write the file again, or without that metadata."
        ) from error
    return tuple(feature.get("names") or ()) if isinstance(feature, dict) else ()
