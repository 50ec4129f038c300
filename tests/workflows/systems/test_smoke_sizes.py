"""Recipes with --smoke: the papers' sizes shrunk, the whole chain run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smalti.config import recipes_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECIPES = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
"""semhitok-256 runs as a job, in test_jobs.py; semhitok-quickstart in test_chain.py; the other
quickstarts are checked without a run, in test_chain_checks.py.
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "recipe", [name for name in RECIPES if "-quickstart" not in name and name != "semhitok-256"]
)
def test_smoke_of_a_recipe(
    start: Any, as_driver: dict[str, str], recipe: str, tmp_path: Path
) -> None:
    own = [f"out={tmp_path / 'out'}", "resources.workers=1"]
    running = start(["-m", "smalti", "run", recipe, "--smoke", *own], as_driver)
    assert running.wait() == 0, running.text()[-6000:]
    assert (tmp_path / "out-smoke" / "report.html").is_file()
