"""`smalti show`: the record of an artifact, or the artifacts of an output folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping

from smalti import storage
from smalti.artifact import PARTIAL, RECORD, Artifact
from smalti.errors import ArtifactError
from smalti.progress import format_seconds

_DEPTH = 4


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `smalti show`."""
    parser.add_argument(
        "artifact",
        metavar="ARTIFACT",
        help="folder or URL of an artifact, or of a run's whole output",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="the record as JSON (a list of records for a whole output)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the record, or a table of the artifacts below a folder.

    Raises:
        ArtifactError: if there is no artifact.
    """
    path = arguments.artifact
    if not storage.exists(path):
        raise ArtifactError(f"nothing exists at {path}: check the path")
    artifact = Artifact.find(path)
    below = [found for found in _below(path) if found != path]
    if artifact is None and storage.exists(storage.join(path, PARTIAL)):
        below.append(path)
    if artifact is None and not below:
        raise ArtifactError(
            f"{path} holds no artifact: expected the folder of a stage, or the `out` folder of a run"
        )
    if arguments.json:
        _print_json(artifact, below)
    elif artifact is not None:
        print(describe(artifact))
        if below:
            print("\nparts\n" + table(below))
    else:
        print(table(below))


def describe(artifact: Artifact) -> str:
    """The record as text."""
    sections: list[tuple[str, Mapping[str, object]]] = [
        ("counts", {name: f"{count:,}" for name, count in artifact.counts.items()}),
        ("scores", flat(artifact.scores)),
        ("parents", artifact.parents),
        ("config", flat(artifact.config)),
        ("versions", {"smalti": artifact.code_version, **artifact.versions}),
    ]
    lines = [
        f"{artifact.kind}: {artifact.path}",
        f"  fingerprint  {artifact.fingerprint}",
        f"  created      {artifact.created} in {format_seconds(artifact.seconds)}",
    ]
    for title, values in sections:
        if values:
            width = max(len(name) for name in values)
            lines += ["", title, *(f"  {name:<{width}}  {value}" for name, value in values.items())]
    return "\n".join(lines)


def table(paths: list[str]) -> str:
    """One line per artifact: path, kind, fingerprint, time and counts."""
    rows = []
    for path in paths:
        artifact = Artifact.find(path)
        if artifact is None:
            partial = storage.read_json(storage.join(path, PARTIAL))
            rows.append(
                (
                    path,
                    str(partial.get("kind", "?")),
                    str(partial.get("fingerprint", "?")),
                    "incomplete",
                    "",
                )
            )
            continue
        counts = ", ".join(f"{count:,} {name}" for name, count in artifact.counts.items())
        rows.append(
            (path, artifact.kind, artifact.fingerprint, format_seconds(artifact.seconds), counts)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    )


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Dotted keys to short JSON values; empty mappings are left out."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            )
    return found


def _below(path: str, depth: int = 0) -> Iterator[str]:
    """Folders with a record, finished or not, in the order of their names."""
    if depth > _DEPTH:
        return
    names = storage.list_names(path)
    if RECORD in names or PARTIAL in names:
        yield path
    for name in names:
        if (
            "." not in name
            and name not in ("train", "val", "quarantine")
            and storage.is_dir(storage.join(path, name))
        ):
            yield from _below(storage.join(path, name), depth + 1)


def _print_json(artifact: Artifact | None, below: list[str]) -> None:
    if artifact is not None:
        print(
            json.dumps(
                storage.read_json(storage.join(artifact.path, RECORD)), indent=2, ensure_ascii=False
            )
        )
        return
    records = []
    for path in below:
        name = RECORD if storage.exists(storage.join(path, RECORD)) else PARTIAL
        records.append(
            {
                "path": path,
                "finished": name == RECORD,
                **storage.read_json(storage.join(path, name)),
            }
        )
    print(json.dumps(records, indent=2, ensure_ascii=False))
