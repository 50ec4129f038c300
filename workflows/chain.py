"""The chain of stages: corpus → encoder → features → codebook → tokenizer → tokens → mllm → (bridge →) export → evaluation.

`run_recipe` runs all of it, or one stage. What stands already with the same fingerprint is skipped. Baselines of the
recipe run just before the evaluation, which shows their scores beside the recipe's own.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
from smalti.workflows.systems.registry import system_of
from smalti.workflows.tracking.mlflow import flatten, open_tracker

_MODULES = {
    "corpus": "corpus.stage",
    "features": "features.stage",
    "codebook": "codebook.stage",
    "evaluate": "evaluation.stage",
}
_CLUSTERING = ("features", "codebook")


def run_recipe(recipe: Recipe, *, only: str | None = None) -> list[Artifact]:
    """Run every stage of the recipe in order, or `only` one; returns the artifacts, finished or found.

    The evaluation ends with `<out>/report.html` and `<out>/report.json`. What can be known to be wrong with the
    recipe is said before the first stage. Errors of a stage propagate as `SmaltiError`;
    the same command goes on where it stopped.
    """
    started = time.time()
    _check(recipe, only)
    with ensure_ray(recipe), _run_of(open_tracker(recipe)) as tracker:
        if only and only != "evaluate":
            return [_stage(only)(recipe, tracker)]
        before = stages_of(recipe)[:-1]
        if only:
            artifacts = [find_artifact(recipe, name) for name in before]
        else:
            artifacts = []
            for name in before:
                artifacts.append(_stage(name)(recipe, tracker))
                if name == "corpus":
                    _check_held_out(artifacts[0])
            for name in recipe.baselines:
                _run_baseline(recipe, name, tracker)
        artifacts.append(_stage("evaluate")(recipe, tracker))
    finish(recipe, artifacts, started)
    return artifacts


def _check(recipe: Recipe, only: str | None) -> None:
    """ConfigError for what the recipe alone shows to be wrong: now, not hours later."""
    if only in (None, "corpus") and not recipe.corpus.source:
        raise ConfigError(
            "corpus.source is not set. Name a folder of images, WebDataset tars, Parquet files, or easy-vqa:train."
        )
    if only in system_of(recipe).ignores:
        raise ConfigError(f"system: {recipe.system} has no stage {only}: its chain is {' → '.join(stages_of(recipe))}.")
    if only is not None:
        return
    for variant in (recipe, *(baseline_recipe(recipe, name) for name in recipe.baselines)):
        for name in ("encoder", "codebook", "tokenizer", "mllm", "bridge"):
            stage_module(name).check(variant)


def _check_held_out(corpus: Artifact) -> None:
    """DataError when nothing is held out: the evaluation at the end of the chain would fail, after all the training."""
    if not corpus.counts.get("val"):
        raise DataError(
            f"{corpus.path} holds out no image, and the evaluation at the end needs some. Raise corpus.val_fraction or name "
            f"a corpus.val_source, and remove {corpus.path}; or run the stages one by one."
        )


@contextmanager
def _run_of(tracker: Tracker) -> Iterator[Tracker]:
    """The run while the body goes on; ended as FINISHED, or as FAILED when an error leaves the body."""
    try:
        yield tracker
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish()


def stages_of(recipe: Recipe) -> list[str]:
    """Names of the stages that this recipe needs, in order."""
    left_out = () if recipe.clusters else _CLUSTERING
    return [name for name in STAGES if name not in left_out and (name != "bridge" or recipe.bridge)]


def baseline_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one baseline: the overrides applied, in `<out>/baselines/<name>`, sharing what is the same."""
    own: dict[str, Any] = {
        "name": f"{recipe.name}-{name}",
        "out": join(recipe.out, "baselines", name),
        "share": [recipe.out, *recipe.share],
        "baselines": {},
    }
    return with_overrides(recipe, {**recipe.baselines[name], **own})


def finish(recipe: Recipe, artifacts: list[Artifact], started: float) -> None:
    """Write the report and print the table of scores with the paths to look at."""
    html, json_path = report.build(recipe, artifacts, recipe.out, started=started)
    print(report.table(artifacts[-1].scores))
    print(f"report  {html}\n        {json_path}\nmodel   {join(recipe.out, 'export')}")


def _run_baseline(recipe: Recipe, name: str, tracker: Tracker) -> None:
    baseline = baseline_recipe(recipe, name)
    log(f"baseline {name}: {', '.join(f'{k}={v}' for k, v in flatten(recipe.baselines[name]).items())}")
    with _run_of(tracker.child(f"baseline {name}")) as child:
        child.params(dump(baseline))
        for stage in stages_of(baseline):
            _stage(stage)(baseline, child)


def _stage(name: str) -> Any:
    """The `run(recipe, tracker)` of a stage; its room is loaded when it is needed."""
    return stage_module(name).run


def stage_module(name: str) -> Any:
    """The module of a stage, imported when it is needed."""
    return importlib.import_module(f"smalti.workflows.{_MODULES.get(name, name)}")
