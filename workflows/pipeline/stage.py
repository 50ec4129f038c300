"""Run a stage: skip it if finished, resume it if interrupted.

A stage passes to `run_stage` its settings (only those that its result depends on: never
`resources`, `tracking` or `out`), its parents and a body. The body writes under `StageRun.path` and
returns counts.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from smalti import artifact, storage
from smalti.artifact import Artifact, Workspace
from smalti.errors import ArtifactError, SmaltiError
from smalti.progress import Progress
from smalti.progress import log as log_line
from smalti.tracking import Tracker
from smalti.workflows.pipeline.lock import holding
from smalti.workflows.tracking.mlflow import open_tracker

if TYPE_CHECKING:
    from smalti.schema import Recipe


STAGES = (
    "corpus",
    "encoder",
    "features",
    "codebook",
    "tokenizer",
    "tokens",
    "mllm",
    "bridge",
    "export",
    "evaluate",
)
"""Stages in the order of the chain; UniCode² may have a bridge, DualToken has no features and no
codebook.
"""
BEAT_S = 30.0
SHARED_FILE = "shared.json"


@dataclass
class StageRun:
    """A running stage.

    The body may fill `scores`; they are written to the artifact's record and to MLflow.
    """

    name: str
    path: str
    recipe: Recipe
    tracker: Tracker
    resumed: bool
    fingerprint: str
    scores: dict[str, object] = field(default_factory=dict)

    def log(self, message: str) -> None:
        """Log one line, prefixed with the stage's name."""
        log_line(f"{self.name}: {message}")

    def progress(self, total: int, unit: str) -> Progress:
        """A progress bar with rate and ETA, labelled with the stage's name."""
        return Progress(total, unit, self.name)


Body = Callable[[StageRun], Mapping[str, int]]


def stage_path(recipe: Recipe, name: str) -> str:
    """`<out>/<name>`; `name` may be nested (`tokenizer/phases/semantic`)."""
    return storage.join(storage.absolute(recipe.out), *name.split("/"))


def find_artifact(recipe: Recipe, name: str) -> Artifact:
    """The finished artifact of a stage of this recipe.

    It lies in `<out>/<name>`, or in the `share` folder where `run_stage` found it. Stages load
    their parents with this.

    Raises:
        ArtifactError: if the stage is not finished, or the shared artifact is missing or has
            changed.
    """
    path = stage_path(recipe, name)
    own = Artifact.find(path)
    record_path = storage.join(storage.absolute(recipe.out), SHARED_FILE)
    if own is not None or not storage.exists(record_path):
        return own or Artifact.load(path)
    noted = storage.read_json(record_path).get(name)
    if noted is None:
        return Artifact.load(path)
    found = Artifact.find(noted["path"])
    if found is None or found.fingerprint != noted["fingerprint"]:
        raise ArtifactError(
            f"The stage {name} of {recipe.out} used {noted['path']} (fingerprint "
            f"{noted['fingerprint']}), which is "
            f"{'missing' if found is None else 'a different artifact now'}. Run the stage {name} "
            "again."
        )
    return found


P = ParamSpec("P")


def _alone(
    stage: Callable[Concatenate[Recipe, str, P], Artifact],
) -> Callable[Concatenate[Recipe, str, P], Artifact]:
    """Lock the stage's folder while it runs; a finished artifact is only read."""

    @functools.wraps(stage)
    def held(recipe: Recipe, name: str, /, *args: P.args, **more: P.kwargs) -> Artifact:
        path = stage_path(recipe, name)
        if Artifact.find(path) is not None:
            return stage(recipe, name, *args, **more)
        with holding(path):
            return stage(recipe, name, *args, **more)

    return held


@_alone
def run_stage(
    recipe: Recipe,
    name: str,
    kind: str,
    config: Mapping[str, object],
    parents: Mapping[str, Artifact],
    body: Body,
    *,
    tracker: Tracker | None = None,
) -> Artifact:
    """The stage's artifact: the finished one, or the one that `body` creates.

    A finished artifact is looked up in `<out>/<name>`, then in the `share` folders. The stage gets
    a child run in MLflow; if the body raises, the run is marked FAILED and the error is raised to
    the caller.

    Args:
        config: the settings that the result depends on.
        body: writes under `StageRun.path` and returns counts.
        tracker: the recipe's run; opened here by default.

    Raises:
        ArtifactError: if the folder holds an artifact of another config.
    """
    path = stage_path(recipe, name)
    wanted = artifact.fingerprint(kind, config, parents)
    done = _find_shared(recipe, name, path, wanted)
    if done is None:
        place = artifact.begin(path, kind, config, parents)
        if isinstance(place, Artifact):
            done = place
    else:
        _note_shared(recipe, name, done)
    if done is not None:
        log_line(f"{name}: skipped: finished in {done.path} (fingerprint {done.fingerprint})")
        return done
    assert isinstance(place, Workspace)
    if place.resumed:
        storage.remove_temporary(path)  # of dead runs: this run holds the lock
    parent = open_tracker(recipe) if tracker is None else tracker
    try:
        result = _make(recipe, name, config, parents, place, body, parent.child(name))
        parent.tags({f"smalti.artifact.{name}": result.fingerprint})
    except BaseException:
        if tracker is None:
            _finish_failed(parent, name)
        raise
    if tracker is None:
        parent.finish()
    return result


def _find_shared(recipe: Recipe, name: str, path: str, wanted: str) -> Artifact | None:
    """A finished artifact of this fingerprint from the `share` folders.

    None if the stage's own folder holds a finished artifact.
    """
    if Artifact.find(path) is not None:
        return None  # `begin` checks its fingerprint
    for other in recipe.share:
        found = Artifact.find(storage.join(storage.absolute(other), *name.split("/")))
        if found is not None and found.fingerprint == wanted:
            return found
    return None


def _note_shared(recipe: Recipe, name: str, found: Artifact) -> None:
    """Record in `<out>/shared.json` where the stage's artifact lies, for later stages."""
    path = storage.join(storage.absolute(recipe.out), SHARED_FILE)
    noted = storage.read_json(path) if storage.exists(path) else {}
    storage.write_json(path, noted | {name: {"path": found.path, "fingerprint": found.fingerprint}})


def _make(
    recipe: Recipe,
    name: str,
    config: Mapping[str, object],
    parents: Mapping[str, Artifact],
    place: Workspace,
    body: Body,
    tracker: Tracker,
) -> Artifact:
    """Run the body inside its child run and finish the artifact."""
    run = StageRun(name, place.path, recipe, tracker, place.resumed, place.fingerprint)
    sources = (
        ", ".join(f"{key} {parent.path}" for key, parent in parents.items())
        or "the recipe's source"
    )
    run.log(f"{'resuming' if place.resumed else 'starting'} on {sources}; output in {place.path}")
    started = time.monotonic()
    try:
        tracker.tags(_tags(run, parents))
        tracker.params(config)
        with _beating(place, started):
            counts = dict(body(run))
        result = place.finish(counts=counts, seconds=time.monotonic() - started, scores=run.scores)
        numbers: dict[str, float] = {f"count/{key}": float(value) for key, value in counts.items()}
        numbers |= {
            key: float(value) for key, value in run.scores.items() if isinstance(value, int | float)
        }
        tracker.metrics(numbers | {"duration_s": result.seconds})
        tracker.finish()
    except BaseException:
        _finish_failed(tracker, name)
        with suppress(SmaltiError):  # a second failure of storage must not hide the first error
            place.abandon()
        raise
    summary = ", ".join(f"{value:,} {key}" for key, value in counts.items() if "/" not in key)
    run.log(f"finished in {result.seconds:.1f} s" + (f": {summary}" if summary else ""))
    return result


@contextmanager
def _beating(place: Workspace, started: float) -> Iterator[None]:
    """Record the elapsed time every 30 seconds, in case the process is killed."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_S):
            try:
                place.beat(time.monotonic() - started)
            except SmaltiError as error:  # the stage itself may still succeed
                log_line(f"{place.kind}: the elapsed time could not be recorded: {error}")

    thread = threading.Thread(target=beat, daemon=True, name="stage-beat")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tags(run: StageRun, parents: Mapping[str, Artifact]) -> dict[str, str]:
    tags = {
        "smalti.stage": run.name,
        "smalti.path": run.path,
        "smalti.fingerprint": run.fingerprint,
    }
    return tags | {f"smalti.parent.{key}": parent.fingerprint for key, parent in parents.items()}


def _finish_failed(tracker: Tracker, name: str) -> None:
    """Mark the run FAILED; errors of the store are only logged."""
    try:
        tracker.finish("FAILED")
    except Exception as error:
        log_line(f"{name}: the MLflow run could not be marked FAILED: {error}")
