"""Writing `<out>/report.html` and `<out>/report.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from smalti import storage
from smalti.artifact import Artifact
from smalti.schema import Recipe
from smalti.workflows.report.facts import gather
from smalti.workflows.report.page import page


def build(
    recipe: Recipe, artifacts: Sequence[Artifact], out: str, *, started: float | None = None
) -> tuple[str, str]:
    """Write report.html and report.json into the folder or URL `out`.

    Sections of what a run does not have (no questions, no model) are left out of the page.

    Args:
        artifacts: those of the recipe's stages, in order; the evaluation with its completed scores
            (`evaluate.run` returns it so).
        started: when the command began, in seconds since the epoch.

    Returns:
        The paths of the HTML and of the JSON file.
    """
    facts = gather(recipe, artifacts, started)
    place = storage.absolute(out)
    html_path, json_path = storage.join(place, "report.html"), storage.join(place, "report.json")
    storage.make_dirs(place)
    record = json.dumps(facts.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
    storage.write_atomic(json_path, (record + "\n").encode())
    storage.write_atomic(html_path, page(facts).encode())
    return html_path, json_path
