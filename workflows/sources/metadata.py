"""Rows of `metadata.jsonl` and `metadata.csv` in a folder of images."""

from __future__ import annotations

import csv
import io
import posixpath
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, TextIO

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    Pairs,
    Unusable,
    caption_names,
    clean_text,
    load_json,
    read_pairs,
    suffix,
    text_encoding,
)

METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Said:
    """One row: an image's path below the source (as `composed`) and its texts.

    `where`: the row's file and line.
    """

    path: str
    where: str
    caption: str | None
    label: str | None
    qa: Pairs


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC); some file systems decompose names."""
    return unicodedata.normalize("NFC", name)


@dataclass
class Metadata:
    """Reads the metadata files of a folder."""

    section: CorpusSection
    root: str
    columns: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Raise DataError if a column of the recipe is in none of the metadata files."""
        for key in ("caption_column", "label_column"):
            name = getattr(self.section, key)
            default = CorpusSection.model_fields[key].default
            if self.columns and name != default and name not in self.columns:
                raise DataError(
                    f"The metadata files of {self.root} have no column {name!r} (corpus.{key}); "
                    f"they have {', '.join(sorted(self.columns))}."
                )

    def read(self, name: str, stream: BinaryIO) -> Iterator[Said | Unusable]:
        """Yield the rows of one file, in order.

        Each `file_name` is relative to the metadata file's folder.

        Raises:
            DataError: if the file has no column `file_name`.
        """
        folder = name.rsplit("/", 1)[0] + "/" if "/" in name else ""
        with _lines_of(stream) as text:
            for number, row in (
                self._table(name, text) if suffix(name) == ".csv" else _json_lines(text)
            ):
                where = f"{name}:{number}"
                try:
                    if isinstance(row, csv.Error):
                        raise row
                    yield self._said(folder, where, load_json(row) if isinstance(row, str) else row)
                except KeyError as error:
                    yield Unusable(where, "bad_metadata", f"the row has no {error}")
                except (ValueError, TypeError, AttributeError, csv.Error) as error:
                    yield Unusable(where, "bad_metadata", f"{type(error).__name__}: {error}")

    def _table(self, name: str, text: TextIO) -> Iterator[tuple[int, dict[str, str] | csv.Error]]:
        """Yield (last line, row) of a CSV; for a malformed row, its error."""
        table = csv.DictReader(text, skipinitialspace=True, strict=True)
        try:
            heads = [head.strip() for head in table.fieldnames or []]
        except csv.Error as error:
            raise DataError(
                f"{self.root}/{name}: its first line, the names of the columns, is not CSV: "
                f"{error}."
            ) from error
        if "file_name" not in heads:
            raise DataError(
                f"{self.root}/{name} has no column file_name; it has "
                f"{', '.join(heads) or 'none at all'}. Name the images there, with commas between "
                "the columns."
            )
        table.fieldnames = heads
        while True:
            try:
                row: dict[str, str] | csv.Error = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                row = error
            yield table.reader.line_num, row

    def _said(self, folder: str, where: str, record: Mapping[str, object]) -> Said:
        self.columns |= {str(name) for name in record if name is not None}
        if not record["file_name"]:
            raise ValueError("file_name is empty")
        path = composed(posixpath.normpath(folder + str(record["file_name"]).replace("\\", "/")))
        caption = clean_text(
            [record.get(name) for name in caption_names(self.section.caption_column)]
        )
        return Said(
            path,
            where,
            caption,
            clean_text(record.get(self.section.label_column)),
            read_pairs(record),
        )


@contextmanager
def _lines_of(stream: BinaryIO) -> Iterator[TextIO]:
    """Open a text, decoded as in `as_text`, with `\\n` as line ending."""
    with tempfile.TemporaryFile() as copy:  # the stream may not be seekable
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        encoding = text_encoding(copy.read(2))
        copy.seek(0)
        yield io.TextIOWrapper(copy, encoding, errors="replace")


def _json_lines(text: TextIO) -> Iterator[tuple[int, str]]:
    """(number, line) of each line that is not blank.

    Only `\\n` ends a line: JSON may contain U+2028 and similar.
    """
    return (
        (number, line.removesuffix("\n")) for number, line in enumerate(text, 1) if line.strip()
    )
