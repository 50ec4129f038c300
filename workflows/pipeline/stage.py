"""What every stage does alike: skip what stands, go on with what is half-made, record the rest, tell the user.

A stage hands `run_stage` its settings (only those that its result depends on: never `resources`, `tracking` or `out`),
its parents and a body. The body writes under `StageRun.path` and returns counts.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

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


STAGES = ("corpus", "encoder", "features", "codebook", "tokenizer", "tokens", "mllm", "bridge", "export", "evaluate")
"""Stages in the order of the chain; UniCode² may have a bridge, DualToken has no features and no codebook."""
BEAT_S = 30.0
SHARED_FILE = "shared.json"


@dataclass
class StageRun:
    """A stage at work. `scores` may be filled by the body; they end in the artifact's record and in MLflow."""

    name: str
    path: str
    recipe: Recipe
    tracker: Tracker
    resumed: bool
    fingerprint: str
    scores: dict[str, Any] = field(default_factory=dict)

    def log(self, message: str) -> None:
        """One plain line on the terminal, headed by the stage's name."""
        log_line(f"{self.name}: {message}")

    def progress(self, total: int, unit: str) -> Progress:
        """A progress bar with rate and ETA, labelled with the stage's name."""
        return Progress(total, unit, self.name)


Body = Callable[[StageRun], Mapping[str, int]]


def stage_path(recipe: Recipe, name: str) -> str:
    """`<out>/<name>`; `name` may be nested (`tokenizer/phases/semantic`)."""
    return storage.join(storage.absolute(recipe.out), *name.split("/"))


def find_artifact(recipe: Recipe, name: str) -> Artifact:
    """The finished artifact of a stage of this recipe: in `<out>/<name>`, or where `run_stage` found it to be shared.

    This is how a stage gets its parents. Errors: ArtifactError when the stage has not run, or the shared one changed.
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
            f"The stage {name} of {recipe.out} used {noted['path']} (fingerprint {noted['fingerprint']}), which is "
            f"{'gone' if found is None else 'another one now'}. Run the stage {name} again."
        )
    return found


P = ParamSpec("P")


def _alone(stage: Callable[Concatenate[Recipe, str, P], Artifact]) -> Callable[Concatenate[Recipe, str, P], Artifact]:
    """`stage` with its place held against other runs while it makes something; what is finished is only read."""

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
    config: dict[str, Any],
    parents: Mapping[str, Artifact],
    body: Body,
    *,
    tracker: Tracker | None = None,
) -> Artifact:
    """The stage's finished artifact: found in `<out>/<name>` or in a `share` folder, or made now by `body`.

    `tracker` is the recipe's run (default: opened here); the stage gets a child run, which is FAILED when the body
    raises. The error itself goes on to the caller. Errors: ArtifactError when the place holds another config.
    """
    path = stage_path(recipe, name)
    wanted = artifact.fingerprint(kind, config, parents)
    done = _standing(recipe, name, path, wanted)
    if done is None:
        place = artifact.begin(path, kind, config, parents)
        if isinstance(place, Artifact):
            done = place
    else:
        _note_shared(recipe, name, done)
    if done is not None:
        log_line(f"{name}: skipped, stands already in {done.path} (fingerprint {done.fingerprint})")
        return done
    assert isinstance(place, Workspace)
    if place.resumed:
        storage.remove_temporary(path)  # of dead runs: the place is held
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


def _standing(recipe: Recipe, name: str, path: str, wanted: str) -> Artifact | None:
    """A finished artifact of this fingerprint, looked for at home, then in the `share` folders."""
    if Artifact.find(path) is not None:
        return None  # `begin` tells whether it is the same one
    for other in recipe.share:
        found = Artifact.find(storage.join(storage.absolute(other), *name.split("/")))
        if found is not None and found.fingerprint == wanted:
            return found
    return None


def _note_shared(recipe: Recipe, name: str, found: Artifact) -> None:
    """Keep in `<out>/shared.json` where the stage's artifact lies, for the stages after it."""
    path = storage.join(storage.absolute(recipe.out), SHARED_FILE)
    noted = storage.read_json(path) if storage.exists(path) else {}
    storage.write_json(path, noted | {name: {"path": found.path, "fingerprint": found.fingerprint}})


def _make(
    recipe: Recipe,
    name: str,
    config: dict[str, Any],
    parents: Mapping[str, Artifact],
    place: Workspace,
    body: Body,
    tracker: Tracker,
) -> Artifact:
    """Run the body inside its child run and finish the artifact."""
    run = StageRun(name, place.path, recipe, tracker, place.resumed, place.fingerprint)
    sources = ", ".join(f"{key} {parent.path}" for key, parent in parents.items()) or "the recipe's source"
    run.log(f"{'going on' if place.resumed else 'starting'} on {sources}; output in {place.path}")
    started = time.monotonic()
    try:
        tracker.tags(_tags(run, parents))
        tracker.params(config)
        with _beating(place, started):
            counts = dict(body(run))
        result = place.finish(counts=counts, seconds=time.monotonic() - started, scores=run.scores)
        numbers: dict[str, float] = {f"count/{key}": float(value) for key, value in counts.items()}
        numbers |= {key: float(value) for key, value in run.scores.items() if isinstance(value, int | float)}
        tracker.metrics(numbers | {"duration_s": result.seconds})
        tracker.finish()
    except BaseException:
        _finish_failed(tracker, name)
        with suppress(SmaltiError):  # a store that is down as well must not hide the first error
            place.abandon()
        raise
    told = ", ".join(f"{value:,} {key}" for key, value in counts.items() if "/" not in key)
    run.log(f"finished in {result.seconds:.1f} s" + (f": {told}" if told else ""))
    return result


@contextmanager
def _beating(place: Workspace, started: float) -> Iterator[None]:
    """Note the time worked every half minute, so that a killed try's is not lost."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_S):
            try:
                place.beat(time.monotonic() - started)
            except SmaltiError as error:  # the work itself may still go well
                log_line(f"{place.kind}: the time worked could not be noted: {error}")

    thread = threading.Thread(target=beat, daemon=True, name="stage-beat")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tags(run: StageRun, parents: Mapping[str, Artifact]) -> dict[str, str]:
    tags = {"smalti.stage": run.name, "smalti.path": run.path, "smalti.fingerprint": run.fingerprint}
    return tags | {f"smalti.parent.{key}": parent.fingerprint for key, parent in parents.items()}


def _finish_failed(tracker: Tracker, name: str) -> None:
    """Mark the run FAILED. A store that is down as well is told of, and must not hide the first error."""
    try:
        tracker.finish("FAILED")
    except Exception as error:
        log_line(f"{name}: the MLflow run could not be marked FAILED: {error}")
