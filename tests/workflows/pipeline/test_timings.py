"""What workers note: parts add up, the slowest is named, counts reach the line and the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smalti.schema import Recipe
from smalti.workflows.pipeline import timings as shard_tally
from smalti.workflows.pipeline.stage import StageRun, run_stage
from smalti.workflows.pipeline.timings import Tally, shard_progress


def test_parts_are_timed_and_the_slowest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tally, now = Tally(), [10.0]
    monkeypatch.setattr(shard_tally.time, "monotonic", lambda: now[0])
    for name, seconds in (
        ("read", 0.6),
        ("decode", 2.0),
        ("model", 7.0),
        ("write", 0.3),
        ("model", 0.1),
    ):
        with tally.part(name):
            now[0] += seconds
    assert tally.lines() == [
        "model 71 %, decode 20 %, read 6 %, write 3 % of 10.0 worker seconds: model is the slowest part"
    ]
    assert tally.scores()["seconds/model"] == pytest.approx(7.1)
    assert "seconds/start" not in tally.scores()
    assert tally.drain()["seconds/read"] == pytest.approx(0.6)
    assert tally.drain() == {}
    assert tally.lines() == []


def test_what_was_done_again_stands_in_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(run: StageRun) -> dict[str, int]:
        with shard_progress(run, 30) as (tally, update):
            tally.add({"retried/kept": 1})
            update(10)
            tally.add({"retried/restarts": 2, "seconds/model": 1.0})
            update(20)
        return {}

    wanted = Recipe.model_validate({"out": str(tmp_path), "tracking": {"uri": "off"}})
    scores: dict[str, Any] = run_stage(wanted, "things", "things", {}, {}, body).scores
    assert scores == {
        "seconds/model": 1.0,
        "retried/kept": 1,
        "retried/remade": 0,
        "retried/restarts": 2,
    }
    said = capsys.readouterr().err
    assert "30/30 (100 %) images" in said
    assert "kept 1, restarts 2" in said
    assert "things: 1 shards or groups kept from an earlier run, 2 lost actors restarted" in said
