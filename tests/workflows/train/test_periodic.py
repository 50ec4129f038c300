"""Steps in which all workers do something together."""

from __future__ import annotations

import torch

from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.periodic import Periodic


def test_workers_ask_in_the_same_steps_about_once_in_so_many_seconds(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr("smalti.workflows.train.periodic.time.monotonic", lambda: now)
    pace = Periodic(1.0, Collectives(), torch.device("cpu"))
    due = []
    for step, took_s in enumerate([0.125] * 40 + [3.0] * 3 + [1e-5] * 10, 1):
        now += took_s
        due += [step] if pace.due(step) else []
    assert due == [1, 9, 17, 25, 33, 41, 43, 44], "every eighth of quick steps, then each slow one"
