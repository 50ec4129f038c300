"""Sources of images, one module per format; each returns groups (see `base`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from smalti import storage
from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.arrow import arrow_groups, is_arrow
from smalti.workflows.sources.base import (
    IMAGE_SUFFIXES,
    Group,
    Locator,
    Pairs,
    Sample,
    Unusable,
    filesystem,
    named,
    suffix,
)
from smalti.workflows.sources.easy_vqa import easy_vqa_groups
from smalti.workflows.sources.folder import folder_groups, listed
from smalti.workflows.sources.generated import generated_groups
from smalti.workflows.sources.jsonl import is_jsonl, jsonl_groups
from smalti.workflows.sources.listing import SideTables, each_file
from smalti.workflows.sources.network import reading
from smalti.workflows.sources.parquet import is_parquet, parquet_groups
from smalti.workflows.sources.webdataset import is_tar, tar_groups

__all__ = [
    "SOURCES",
    "Group",
    "Locator",
    "Pairs",
    "Sample",
    "Unusable",
    "detect",
    "find_groups",
    "listed",
]

SOURCES: dict[str, Callable[[str, CorpusSection, int], Iterable[Group]]] = {
    "folder": folder_groups,
    "webdataset": tar_groups,
    "parquet": parquet_groups,
    "arrow": arrow_groups,
    "jsonl": jsonl_groups,
    "easy-vqa": easy_vqa_groups,
    "generated": generated_groups,
}
FILES = ("folder", "webdataset", "parquet", "arrow", "jsonl")


def find_groups(
    source: str | list[str] | None, section: CorpusSection, seed: int
) -> Iterator[Group]:
    """Yield the groups of one or several sources, in order.

    Raises:
        DataError: if a source cannot be found.
    """
    if not source:
        raise DataError(
            "corpus.source is not set. Name a folder of images, WebDataset tars, Parquet files, "
            "or easy-vqa:train."
        )
    for one in [source] if isinstance(source, str) else source:
        with reading(one):
            kind = detect(one) if section.format == "auto" else section.format
            # actors may have another working directory
            place = storage.absolute(one) if kind in FILES else one
            yield from SOURCES[kind](place, section, seed)


def detect(source: str) -> str:
    """Detect the format of a source by its name or the folder's files.

    Raises:
        DataError: if the format is ambiguous.
    """
    for name in ("easy-vqa", "generated"):
        if source == name or source.startswith(name + ":"):
            return name
    if is_tar(source):
        return "webdataset"
    if is_parquet(source):
        return "parquet"
    if is_arrow(source):
        return "arrow"
    if is_jsonl(source):
        return "jsonl"
    if named(source).endswith((".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst")):
        raise DataError(
            f"corpus.source: {source} is compressed, which allows no random access to its lines. "
            "Unpack it."
        )
    fs, inside = filesystem(source)
    if not fs.isdir(inside):
        raise DataError(
            f"corpus.source: {source} is neither a folder nor a .tar, .parquet, .arrow or .jsonl "
            "file or pattern. Check the path, or set corpus.format."
        )
    return _detect_folder(source)


def _detect_folder(source: str) -> str:
    """The format of the files in a folder; more than one is an error.

    The tables that img2dataset writes beside its tars or folders are not counted as data.
    """
    tables = SideTables(source)
    kinds = {"folder": False, "parquet": False, "webdataset": False, "arrow": False}
    for name in each_file(source, []):
        tables.meet(name)
        kinds["folder"] |= suffix(name) in IMAGE_SUFFIXES
        kinds["parquet"] |= is_parquet(name) and not name.endswith(".parquet")
        kinds["webdataset"] |= is_tar(name)
        kinds["arrow"] |= is_arrow(name)
    kinds["parquet"] |= len(tables.found()) < len(tables.tables)
    found = [kind for kind, there in kinds.items() if there]
    if len(found) > 1:
        raise DataError(
            f"corpus.source: {source} holds several kinds of data ({', '.join(found)}). Set "
            "corpus.format."
        )
    return found[0] if found else "folder"
