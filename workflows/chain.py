"""The chain of stages, from the corpus to the evaluation.

`run_recipe` runs all of it, or one stage. A stage whose artifact is finished with the same
fingerprint is skipped. Baselines of the recipe run before the evaluation, which shows their scores
as baselines.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from smalti.artifact import Artifact
from smalti.config import dump, with_overrides
from smalti.errors import ConfigError, DataError
from smalti.progress import log
from smalti.schema import Recipe
from smalti.storage import join
from smalti.tracking import Tracker
from smalti.workflows import report
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.pipeline.stage import STAGES, find_artifact
from smalti.workflows.tracking.mlflow import flatten, open_tracker

MODULES = {
    "corpus": "smalti.workflows.corpus.stage",
    "encoder": "smalti.workflows.encoder",
    "features": "smalti.workflows.features.stage",
    "codebook": "smalti.workflows.codebook.stage",
    "tokenizer": "smalti.workflows.tokenizer",
    "tokens": "smalti.workflows.tokens",
    "mllm": "smalti.workflows.mllm",
    "bridge": "smalti.workflows.bridge",
    "export": "smalti.workflows.export",
    "evaluate": "smalti.workflows.evaluation.stage",
}
"""Where each stage is, imported when it runs: torch and transformers take seconds to load."""
CHECKED = ("encoder", "codebook", "tokenizer", "mllm", "bridge")
"""Stages with a `check(recipe)` of what the recipe alone shows to be wrong."""
CLUSTERING = ("features", "codebook")


class Stage(Protocol):
    """Interface of a stage's module."""

    def run(self, recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
        """Make the stage's artifact, or find it finished."""


class CheckedStage(Stage, Protocol):
    """A stage that can check a recipe before anything runs."""

    def check(self, recipe: Recipe) -> None:
        """Raise ConfigError or ArtifactError for a recipe that cannot work."""


def run_recipe(recipe: Recipe, *, only: str | None = None) -> list[Artifact]:
    """Run every stage of a recipe in order, or one.

    The same command resumes an interrupted run. The evaluation writes `<out>/report.html` and
    `<out>/report.json`.

    Args:
        only: name of the one stage to run.

    Returns:
        The artifacts, in the order of the chain.

    Raises:
        SmaltiError: of a stage; what the recipe alone shows to be wrong is raised before the first
            stage.
    """
    started = time.time()
    _check(recipe, only)
    with ensure_ray(recipe), _run_of(open_tracker(recipe)) as tracker:
        if only and only != "evaluate":
            return [_stage(only).run(recipe, tracker)]
        before = stages_of(recipe)[:-1]
        artifacts = (
            [find_artifact(recipe, name) for name in before]
            if only
            else _run_all(recipe, before, tracker)
        )
        artifacts.append(_stage("evaluate").run(recipe, tracker))
    finish(recipe, artifacts, started)
    return artifacts


def _run_all(recipe: Recipe, names: list[str], tracker: Tracker) -> list[Artifact]:
    """Run stages in order, then the baselines."""
    artifacts = []
    for name in names:
        artifacts.append(_stage(name).run(recipe, tracker))
        if name == "corpus":
            _check_held_out(artifacts[0])
    for name in recipe.baselines:
        _run_baseline(recipe, name, tracker)
    return artifacts


def _check(recipe: Recipe, only: str | None) -> None:
    """Raise for what the recipe alone shows to be wrong."""
    if only in (None, "corpus") and not recipe.corpus.source:
        raise ConfigError(
            "corpus.source is not set. Name a folder of images, WebDataset tars, Parquet files, "
            "or easy-vqa:train."
        )
    if only in CLUSTERING or only == "bridge":
        _check_has_stage(recipe, only)
    if only is not None:
        return
    for variant in (recipe, *(baseline_recipe(recipe, name) for name in recipe.baselines)):
        for name in CHECKED:
            _checked(name).check(variant)


def _check_has_stage(recipe: Recipe, only: str) -> None:
    """ConfigError if the chain of the recipe has no stage `only`."""
    from smalti.workflows.systems.registry import system_of

    if only == "bridge" and recipe.bridge is None:
        raise ConfigError(
            "bridge.decoder is not set: name a text-to-image pipeline of diffusers, a folder or "
            "hub name, as in bridge.decoder=stabilityai/stable-diffusion-xl-base-1.0."
        )
    if only in system_of(recipe).ignores:
        raise ConfigError(
            f"system: {recipe.system} has no stage {only}: its chain is "
            f"{' → '.join(stages_of(recipe))}."
        )


def _check_held_out(corpus: Artifact) -> None:
    """DataError if no image is held out: the evaluation would fail after all the training."""
    if not corpus.counts.get("val"):
        raise DataError(
            f"{corpus.path} holds out no image, and the evaluation needs some. Raise "
            f"corpus.val_fraction or set corpus.val_source, and remove {corpus.path}; or run the "
            "stages one by one."
        )


@contextmanager
def _run_of(tracker: Tracker) -> Iterator[Tracker]:
    """Finish a tracked run at the end of the block: FINISHED, or FAILED after an error."""
    try:
        yield tracker
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish()


def stages_of(recipe: Recipe) -> list[str]:
    """Names of the stages of a recipe, in order."""
    skipped = () if recipe.clusters else CLUSTERING
    return [name for name in STAGES if name not in skipped and (name != "bridge" or recipe.bridge)]


def baseline_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of a baseline, in `<out>/baselines/<name>`.

    Stages that its overrides do not change are shared with the recipe.
    """
    own: dict[str, object] = {
        "name": f"{recipe.name}-{name}",
        "out": join(recipe.out, "baselines", name),
        "share": [recipe.out, *recipe.share],
        "baselines": {},
    }
    return with_overrides(recipe, {**recipe.baselines[name], **own})


def finish(recipe: Recipe, artifacts: list[Artifact], started: float) -> None:
    """Write the report; print the table of scores and the paths."""
    html, json_path = report.build(recipe, artifacts, recipe.out, started=started)
    print(report.table(artifacts[-1].scores))
    print(f"report  {html}\n        {json_path}\nmodel   {join(recipe.out, 'export')}")


def _run_baseline(recipe: Recipe, name: str, tracker: Tracker) -> None:
    baseline = baseline_recipe(recipe, name)
    log(
        f"baseline {name}: "
        f"{', '.join(f'{k}={v}' for k, v in flatten(recipe.baselines[name]).items())}"
    )
    with _run_of(tracker.child(f"baseline {name}")) as child:
        child.params(dump(baseline))
        for stage in stages_of(baseline):
            _stage(stage).run(baseline, child)


def _stage(name: str) -> Stage:
    """The module of a stage."""
    return _module(name)


def _checked(name: str) -> CheckedStage:
    """The module of a stage with a check."""
    return _module(name)


def _module(name: str) -> Any:
    return importlib.import_module(MODULES[name])
