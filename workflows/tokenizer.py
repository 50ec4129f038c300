"""Stage `tokenizer`: the visual tokenizer of a recipe's system; what each system makes stands in `systems/`."""

from __future__ import annotations

import importlib
from typing import Any

from smalti.artifact import Artifact
from smalti.schema import Recipe
from smalti.tracking import Tracker
from smalti.workflows.pipeline.stage import find_artifact, run_stage

SYSTEMS = {
    "semhitok": "smalti.workflows.systems.semhitok",
    "unicode2": "smalti.workflows.systems.unicode2",
    "dualtoken": "smalti.workflows.systems.dualtoken",
}
"""A module a system: `parents(recipe)`, names of the stages before; `check(recipe)`; `settings_of(recipe)`, what the
tokenizer depends on; `body(parents)`, which makes it."""


def system_of(recipe: Recipe) -> Any:
    """The module of the recipe's system."""
    return importlib.import_module(SYSTEMS[recipe.system])


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The tokenizer artifact: a `save_pretrained` folder, its phases under `phases/`.

    Parents and settings: those of the system. Counts: num_codes, tokens an image.
    """
    system = system_of(recipe)
    system.check(recipe)
    parents = {name: find_artifact(recipe, name) for name in system.parents(recipe)}
    config = system.settings_of(recipe)
    return run_stage(recipe, "tokenizer", "tokenizer", config, parents, system.body(parents), tracker=tracker)


def check(recipe: Recipe) -> None:
    """Raises for what would only show after hours: batches that workers cannot share, losses that cannot be computed.

    ConfigError names the key; ArtifactError: weights that are not there.
    """
    system_of(recipe).check(recipe)
