"""Every system by its name in a recipe.

A new system is: its class here, its keys in `smalti/schema/systems.py`, its saved tokenizer in
`tokenizers/loading.py`.
"""

from __future__ import annotations

from smalti.schema import Recipe
from smalti.workflows.systems.base import System
from smalti.workflows.systems.dualtoken import DualTokenSystem
from smalti.workflows.systems.semhitok import SemHiTokSystem
from smalti.workflows.systems.unicode2 import Unicode2System

SYSTEMS: dict[str, System] = {
    system.name: system for system in (SemHiTokSystem(), DualTokenSystem(), Unicode2System())
}


def system_of(recipe: Recipe) -> System:
    """The system of a recipe."""
    return SYSTEMS[recipe.system]
