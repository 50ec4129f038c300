"""What `--smoke` takes of a machine's GPUs."""

from __future__ import annotations

import pytest

from smalti.config import load_recipe
from smalti.workflows import smoke


@pytest.mark.parametrize(
    ("wanted", "seen", "workers", "gpus"),
    [
        (1, 0, 2, 0),
        (1, 1, 1, 1),
        (1, 8, 2, 1),
        (0, 8, 2, 1),
        (0, 0, 2, 0),
        (2, 1, 1, 1),
        (0.5, 1, 2, 0.5),
        (2, 4, 2, 2),
    ],
)
def test_gpus_are_taken_wherever_ray_sees_some(
    wanted: float, seen: int, workers: int, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "_gpus_in_sight", lambda recipe: seen)
    found = smoke._resources(load_recipe("semhitok-256", [f"resources.gpus_per_worker={wanted}"]))
    assert (found["resources.workers"], found["resources.gpus_per_worker"]) == (workers, gpus)


def test_a_recipe_that_keeps_to_the_cpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "_gpus_in_sight", lambda recipe: 8)
    found = smoke._resources(load_recipe("semhitok-quickstart", ["resources.device=cpu"]))
    assert found["resources.gpus_per_worker"] == 0
