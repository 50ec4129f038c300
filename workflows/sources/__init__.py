"""Where images come from: one file a source, each giving groups (see `base`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from smalti import storage
from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources.arrow import arrow_groups, is_arrow
from smalti.workflows.sources.base import (
    IMAGE_SUFFIXES,
    Group,
    Locator,
    Lost,
    Pairs,
    Sample,
    filesystem,
    list_files,
    side_tables,
    suffix,
    unreadable,
)
from smalti.workflows.sources.easy_vqa import easy_vqa_groups
from smalti.workflows.sources.folder import folder_groups
from smalti.workflows.sources.generated import generated_groups
from smalti.workflows.sources.jsonl import is_jsonl, jsonl_groups
from smalti.workflows.sources.parquet import is_parquet, parquet_groups
from smalti.workflows.sources.webdataset import is_tar, tar_groups

__all__ = ["SOURCES", "Group", "Locator", "Lost", "Pairs", "Sample", "detect", "find_groups"]

SOURCES: dict[str, Callable[[str, CorpusSection, int], Sequence[Group]]] = {
    "folder": folder_groups,
    "webdataset": tar_groups,
    "parquet": parquet_groups,
    "arrow": arrow_groups,
    "jsonl": jsonl_groups,
    "easy-vqa": easy_vqa_groups,
    "generated": generated_groups,
}
FILES = ("folder", "webdataset", "parquet", "arrow", "jsonl")


def find_groups(source: str | list[str] | None, section: CorpusSection, seed: int) -> list[Group]:
    """All groups of a source or of several, in the order given. Errors: DataError when one cannot be found."""
    if not source:
        raise DataError(
            "corpus.source is not set. Name a folder of images, WebDataset tars, Parquet files, or easy-vqa:train."
        )
    sources = [source] if isinstance(source, str) else source
    groups: list[Group] = []
    for one in sources:
        kind = detect(one) if section.format == "auto" else section.format
        place = storage.absolute(one) if kind in FILES else one  # actors may stand in another folder
        try:
            groups += SOURCES[kind](place, section, seed)
        except OSError as error:
            raise unreadable(one, error) from error
    return groups


def detect(source: str) -> str:
    """The format of a source, by its name, or by what lies in the folder. Errors: DataError when it is unclear."""
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
    fs, inside = filesystem(source)
    if not fs.isdir(inside):
        raise DataError(
            f"corpus.source: {source} is neither a folder nor a .tar, .parquet, .arrow or .jsonl file or pattern. "
            "Check the path, or set corpus.format."
        )
    return _detect_folder(source, list_files(source)[0])


def _detect_folder(source: str, names: list[str]) -> str:
    """What kind lies in a folder; two of them are unclear. The tables of what img2dataset fetched, beside its tars or
    folders, are no data."""
    tables = side_tables(names)
    data = [name for name in names if name not in tables]
    kinds = {
        "folder": any(suffix(name) in IMAGE_SUFFIXES for name in data),
        "parquet": any(is_parquet(name) for name in data),
        "webdataset": any(is_tar(name) for name in data),
        "arrow": any(is_arrow(name) for name in data),
    }
    found = [kind for kind, there in kinds.items() if there]
    if len(found) > 1:
        raise DataError(f"corpus.source: {source} holds several kinds of data ({', '.join(found)}). Set corpus.format.")
    return found[0] if found else "folder"
