"""Source `arrow`: Arrow files, and folders of `datasets.save_to_disk`.

Read with pyarrow; Hugging Face's `datasets` is not needed.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from smalti import storage
from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.base import (
    CAPTION_NAMES,
    DEFAULT_CAPTION,
    DEFAULT_LABEL,
    ReadBytes,
    Sample,
    Unusable,
    filesystem,
    is_arrows,
    load_json,
    named,
    of_each,
    open_seekable,
)
from smalti.workflows.sources.listing import find_files
from smalti.workflows.sources.parquet import (
    Batches,
    ParquetGroup,
    check_image,
    class_names,
    image_column,
    pick_column,
    records,
)

STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class ArrowGroup(ParquetGroup):
    """One Arrow file (IPC stream or file format); `row_groups` is not used."""

    def samples(self) -> Iterator[Sample | Unusable]:
        if self.torn is not None:
            yield Unusable("", "torn_file", self.torn)
            return
        columns = [
            name for name in (self.image, self.caption, self.label, *self.pairs) if name is not None
        ]
        row = 0
        try:
            with _batches(self.path) as batches:
                for batch in batches:
                    for record in records(batch.select(columns)):
                        yield self._sample(str(row), (0, row), record)
                        row += 1
        except (pa.ArrowException, OSError) as error:
            if not is_arrows(error):
                raise
            yield Unusable(
                str(row), "torn_file", f"the file breaks off, rows may be missing: {error}"
            )

    @contextmanager
    def reader(self) -> Iterator[ReadBytes]:
        with open_seekable(self.path) as stream:

            def again(part: int) -> Iterator[pa.RecordBatch]:
                stream.seek(0)
                return (batch.select([self.image]) for batch in _read(stream))

            yield Batches(again).value


@contextmanager
def _batches(path: str) -> Iterator[Iterator[pa.RecordBatch]]:
    with open_seekable(path) as stream:
        yield _read(stream)


def _read(stream: object) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an IPC stream or IPC file."""
    try:
        reader = pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)  # type: ignore[attr-defined]
        file = pa.ipc.open_file(stream)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
        return
    yield from reader


def _schema(path: str) -> pa.Schema:
    with open_seekable(path) as stream:
        try:
            return pa.ipc.open_stream(stream).schema
        except pa.ArrowInvalid:
            stream.seek(0)
            return pa.ipc.open_file(stream).schema


def is_arrow(path: str) -> bool:
    """Whether a name is that of an Arrow file."""
    return named(path).endswith(".arrow")


def arrow_groups(source: str, section: CorpusSection, seed: int) -> list[ArrowGroup]:
    """One group per Arrow file; of a saved dataset, the files that it lists.

    Raises:
        DataError: if the folder holds several splits, or a column is missing.
    """
    return of_each(partial(_group, section=section), _files(source))


def _files(source: str) -> list[str]:
    fs, inside = filesystem(source)
    if fs.isdir(inside) and fs.exists(posixpath.join(inside, SPLITS)):
        try:
            splits = [
                str(name)
                for name in load_json(fs.cat_file(posixpath.join(inside, SPLITS)))["splits"]
            ]
            names = ", ".join(splits)
            one = splits[0]
        except (ValueError, KeyError, TypeError, IndexError):
            names = f"that {SPLITS} should name but does not"
            one = "train"
        raise DataError(
            f"corpus.source: {source} holds the splits {names}. Name one: {source}/{one}."
        )
    if fs.isdir(inside) and fs.exists(posixpath.join(inside, STATE)):
        return [
            storage.join(source, name)
            for name in _listed(source, fs.cat_file(posixpath.join(inside, STATE)))
        ]
    return find_files(source, is_arrow, "Arrow file")


def _listed(source: str, state: bytes) -> list[str]:
    """Names of the files in a saved dataset's state."""
    try:
        return [posixpath.basename(one["filename"]) for one in load_json(state)["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source}/{STATE} does not list the dataset's files ({type(error).__name__}: "
            f"{error}). Save the dataset again, or name its files: {source}/*.arrow."
        ) from error


def _group(path: str, section: CorpusSection) -> ArrowGroup:
    try:
        schema = _schema(path)
    except (pa.ArrowException, OSError) as error:
        if not is_arrows(error):
            raise
        return ArrowGroup(
            path, (), section.image_column, None, None, torn=f"no Arrow file: {error}"
        )
    image = image_column(schema, section.image_column)
    check_image(path, schema, image)
    caption = pick_column(
        path, schema, section.caption_column, "caption_column", DEFAULT_CAPTION, CAPTION_NAMES
    )
    label = pick_column(path, schema, section.label_column, "label_column", DEFAULT_LABEL, ())
    pairs = tuple(name for name in ("qa", "question", "answer") if name in schema.names)
    return ArrowGroup(path, (), image, caption, label, pairs, class_names(path, schema, label))
