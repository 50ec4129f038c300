"""Small planned models, traced once for all tests of the planner."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from smalti.config import load_recipe
from smalti.schema import Recipe
from smalti.workflows.plan.trial import Trial
from smalti.workflows.systems.registry import system_of
from tests.workflows.plan.small_plans import BATCH, ROOT, SMALL


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return load_recipe("semhitok-quickstart", SMALL)


@pytest.fixture(scope="session")
def trials(recipe: Recipe) -> dict[str, Trial]:
    return {model.name: Trial(model) for model in system_of(recipe).planned_models(recipe)}


@pytest.fixture(scope="session")
def measured(recipe: Recipe) -> dict[str, Any]:
    """What bench/real_steps.py measures of each stage."""
    sys.path.insert(0, str(ROOT))
    from bench.real_steps import measure

    return dict(measure(recipe, BATCH))
