"""Artifacts: folders with a record of what they hold and how it was made.

`artifact.json` is written last, so its presence means "finished". While a stage runs,
`artifact.partial.json` exists instead, with the fingerprint of the artifact: the same command
resumes it, another config is refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import smalti
from smalti import storage
from smalti.errors import ArtifactError, DataError

RECORD = "artifact.json"
PARTIAL = "artifact.partial.json"
_PACKAGES = (
    "torch", "ray", "deepspeed", "transformers", "tokenizers", "numpy", "pyarrow", "pillow", "faiss-cpu", "faiss-gpu",
    "mlflow", "pydantic", "safetensors",
)  # fmt: skip
_SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class Artifact:
    """The record of a finished artifact.

    Attributes:
        path: where it was found; not part of the stored record.
        seconds: time of all tries.
        created: date and time in UTC, ISO 8601.
    """

    path: str
    kind: str
    config: dict[str, Any]
    fingerprint: str
    parents: dict[str, str]
    code_version: str
    versions: dict[str, str]
    counts: dict[str, int]
    seconds: float
    scores: dict[str, Any] = field(default_factory=dict)
    created: str = ""

    @classmethod
    def load(cls, path: str) -> Artifact:
        """The finished artifact at `path`.

        Raises:
            ArtifactError: if there is none, or its record is damaged.
        """
        found = cls.find(path)
        if found is not None:
            return found
        if storage.exists(storage.join(path, PARTIAL)):
            raise ArtifactError(
                f"{path} is an incomplete artifact: run the command that started it again to "
                "finish it"
            )
        raise ArtifactError(
            f"there is no artifact at {path} (no {RECORD}): run the stage that writes it, or check "
            "the path"
        )

    @classmethod
    def find(cls, path: str) -> Artifact | None:
        """The finished artifact at `path`, or None.

        Raises:
            ArtifactError: if its record is damaged.
        """
        record_path = storage.join(path, RECORD)
        if not storage.exists(record_path):
            return None
        record = _read_record(record_path)
        names = {f.name for f in dataclasses.fields(cls)} - {"path"}
        missing = names - record.keys()
        if missing:
            raise ArtifactError(
                f"{record_path} lacks {', '.join(sorted(missing))}: remove {path} and run the "
                "stage again"
            )
        return cls(path=path, **{name: record[name] for name in names})

    def save(self) -> None:
        """Write the record, replacing one that exists in a single step."""
        record = dataclasses.asdict(self)
        del record["path"]
        storage.write_json(storage.join(self.path, RECORD), record)


@dataclass
class Workspace:
    """An artifact in progress.

    Attributes:
        resumed: whether an earlier try with the same fingerprint left files here.
        earlier_s: seconds of earlier tries.
    """

    path: str
    kind: str
    config: dict[str, Any]
    parents: dict[str, str]
    fingerprint: str
    resumed: bool
    earlier_s: float = 0.0

    def beat(self, seconds: float) -> None:
        """Record the seconds of this try, in case it is interrupted."""
        storage.write_json(
            storage.join(self.path, PARTIAL), self._partial(self.earlier_s + seconds)
        )

    def finish(
        self, counts: Mapping[str, int], seconds: float, scores: Mapping[str, object] | None = None
    ) -> Artifact:
        """Write the record, then remove the partial one.

        Args:
            counts: what the artifact holds, by name.
            seconds: time of this try; that of earlier tries is added.
            scores: what was measured, by name.
        """
        artifact = Artifact(
            path=self.path,
            kind=self.kind,
            config=self.config,
            fingerprint=self.fingerprint,
            parents=self.parents,
            code_version=code_version(),
            versions=package_versions(),
            counts={name: int(count) for name, count in counts.items()},
            seconds=round(self.earlier_s + float(seconds), 3),
            scores=dict(scores or {}),
            created=_now(),
        )
        artifact.save()
        storage.remove(storage.join(self.path, PARTIAL))
        return artifact

    def abandon(self) -> None:
        """Remove the partial record if there is no other file.

        The next try may then have another config.
        """
        if storage.list_names(self.path) == [PARTIAL]:
            storage.remove(storage.join(self.path, PARTIAL))

    def _partial(self, seconds: float) -> dict[str, object]:
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "config": self.config,
            "parents": self.parents,
            "seconds": round(seconds, 3),
            "touched": _now(),
        }


def fingerprint(kind: str, config: Mapping[str, object], parents: Mapping[str, Artifact]) -> str:
    """16 hex digits of kind, config and the fingerprints of the parents."""
    return _digest(
        kind, _plain(config), {name: artifact.fingerprint for name, artifact in parents.items()}
    )


def begin(
    path: str, kind: str, config: Mapping[str, object], parents: Mapping[str, Artifact]
) -> Artifact | Workspace:
    """The finished artifact at `path`, or a `Workspace` to write it.

    Raises:
        ArtifactError: if `path` holds another artifact, finished or incomplete, or files that are
            no artifact.
    """
    plain = _plain(config)
    parent_prints = {name: artifact.fingerprint for name, artifact in parents.items()}
    wanted = _digest(kind, plain, parent_prints)
    here = {"kind": kind, "config": plain, "parents": parent_prints}
    finished = Artifact.find(path)
    if finished is not None:
        if finished.fingerprint != wanted:
            there = {"kind": finished.kind, "config": finished.config, "parents": finished.parents}
            raise _conflict(path, "a finished artifact", there, here)
        storage.remove(storage.join(path, PARTIAL))
        return finished
    workspace = Workspace(path, kind, plain, parent_prints, wanted, resumed=False)
    partial_path = storage.join(path, PARTIAL)
    if storage.exists(partial_path):
        partial = _read_record(partial_path)
        if partial.get("fingerprint") != wanted:
            raise _conflict(path, "an incomplete artifact", partial, here)
        workspace.resumed = True
        workspace.earlier_s = float(partial.get("seconds", 0.0))
    else:
        _refuse_foreign(path)
    workspace.beat(0.0)
    return workspace


@functools.lru_cache(maxsize=1)
def code_version() -> str:
    """`0.1.0`, and in a checkout `0.1.0+g1a2b3c4d5e6f` (`.dirty` with uncommitted changes)."""
    root = Path(smalti.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return smalti.__version__
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return smalti.__version__
    dirty = ".dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
    return f"{smalti.__version__}+g{commit}{dirty}"


@functools.lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Version of Python and of each installed package that results may depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def differences(
    there: Mapping[str, object], here: Mapping[str, object], prefix: str = ""
) -> list[str]:
    """Lines for the dotted keys whose values differ.

    `key: <there> there, <here> here`, with `absent` for a missing value.
    """
    lines = []
    for key in sorted(there.keys() | here.keys()):
        left = there.get(key, _ABSENT)
        right = here.get(key, _ABSENT)
        if left == right:
            continue
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {_short(left)} there, {_short(right)} here")
    return lines


_ABSENT = object()


def _short(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"


def _conflict(
    path: str, what: str, there: Mapping[str, Any], here: Mapping[str, Any]
) -> ArtifactError:
    """The error for a record that differs, with the differences."""
    keys = ("config", "parents")
    lines = (
        [f"kind: {there.get('kind')} there, {here['kind']} here"]
        if there.get("kind") != here["kind"]
        else []
    )
    for key in keys:
        lines += differences(there.get(key) or {}, here[key], "" if key == "config" else "parent ")
    shown = lines[:_SHOWN_DIFFERENCES]
    if len(lines) > len(shown):
        shown.append(f"… and {len(lines) - len(shown)} more")
    listed = "\n  ".join(shown or ["the record was edited"])
    return ArtifactError(
        f"{path} holds {what} made with other settings:\n  {listed}\nSet another `out`, restore "
        f"these settings, or remove {path}."
    )


def _refuse_foreign(path: str) -> None:
    """Refuse a folder with files that are no artifact: they may be the user's."""
    if storage.exists(path) and not storage.is_dir(path):
        raise ArtifactError(
            f"{path} is a file, expected a folder: set another `out`, or move the file"
        )
    names = [name for name in storage.list_names(path) if not name.startswith(".")]
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise ArtifactError(
            f"{path} holds files that are no artifact ({some}): set another `out`, or move them "
            "away"
        )


def _read_record(path: str) -> dict[str, Any]:
    try:
        record = storage.read_json(path)
    except DataError as error:
        raise ArtifactError(f"{error}") from error
    if not isinstance(record, dict):
        raise ArtifactError(
            f"{path} holds {type(record).__name__}, expected a JSON object: remove it and run again"
        )
    return record


def _plain(config: Mapping[str, object]) -> dict[str, Any]:
    """`config` after JSON: tuples become lists, keys strings."""
    return json.loads(json.dumps(config, allow_nan=False))


def _digest(kind: str, config: Mapping[str, object], parents: Mapping[str, str]) -> str:
    value = {"kind": kind, "config": config, "parents": dict(parents)}
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command, or "" if it fails or git is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
