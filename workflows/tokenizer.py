"""Stage `tokenizer`: the visual tokenizer of a recipe's system."""

from __future__ import annotations

from collections.abc import Mapping

from smalti.artifact import Artifact
from smalti.schema import Recipe
from smalti.tracking import Tracker
from smalti.workflows.pipeline.stage import StageRun, find_artifact, run_stage
from smalti.workflows.systems.registry import system_of


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The tokenizer artifact: a `save_pretrained` folder, its phases under `phases/`.

    Counts: num_codes, tokens (per image).
    """
    check(recipe)
    system = system_of(recipe)
    parents = {name: find_artifact(recipe, name) for name in system.parents(recipe)}

    def body(run: StageRun) -> Mapping[str, int]:
        return system.build(run, parents)

    return run_stage(
        recipe, "tokenizer", "tokenizer", system.settings(recipe), parents, body, tracker=tracker
    )


def check(recipe: Recipe) -> None:
    """Check the settings of the recipe's system (see `System.check`)."""
    system_of(recipe).check(recipe)
