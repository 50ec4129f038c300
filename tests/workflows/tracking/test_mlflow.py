"""MLflow: one parent run for a recipe, a child for a stage, whatever is killed and started again.

Covers: smalti/tracking.py.
"""

from __future__ import annotations

import contextlib
import pickle
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smalti.errors import ConfigError
from smalti.schema import Recipe
from smalti.tracking import NullTracker, Tracker
from smalti.workflows.tracking.mlflow import PARAMS_A_BATCH, MLflowTracker, flatten, open_tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite store for all tests here: its tables take seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def recipe(out: Path, **tracking: Any) -> Recipe:
    return Recipe.model_validate({"out": str(out), "name": "test", "tracking": tracking})


def opened(out: Path, store: str) -> MLflowTracker:
    tracker = open_tracker(recipe(out, uri=store))
    assert isinstance(tracker, MLflowTracker)
    return tracker


def test_the_same_command_goes_on_in_the_same_runs(tmp_path: Path, store: str) -> None:
    tracker = opened(tmp_path, store)
    child = tracker.child("corpus")
    again = opened(tmp_path, store)
    assert again.run_id == tracker.run_id
    assert again.child("corpus").run_id == child.run_id, "a killed child is gone on with"
    child.finish()
    assert again.child("corpus").run_id != child.run_id, "a finished one is not"
    assert opened(tmp_path / "other", store).run_id != tracker.run_id
    client = tracker._client
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == tracker.run_id
    tracker.finish("FAILED")
    assert client.get_run(tracker.run_id).info.status == "FAILED"
    assert client.get_run(opened(tmp_path, store).run_id).info.status == "RUNNING"


def test_params_metrics_images_and_limits(tmp_path: Path, store: str) -> None:
    tracker = opened(tmp_path, store)
    client, run_id = tracker._client, tracker.run_id
    assert client.get_run(run_id).data.params["corpus.image_size"] == "256"
    tracker.params(
        {"many": {str(i): i for i in range(PARAMS_A_BATCH * 2 + 5)}, "long": "x" * 10_000}
    )
    params = client.get_run(run_id).data.params
    assert sum(key.startswith("many.") for key in params) == PARAMS_A_BATCH * 2 + 5
    assert len(params["long"]) == 6000
    tracker.params({"long": "changed"})
    assert client.get_run(run_id).data.tags["changed.long"] == "changed"
    for step in range(1200):
        tracker.metrics({"loss": 1.0 / (step + 1), "nan": float("nan")}, step=step)
    tracker.flush()
    assert len(client.get_metric_history(run_id, "loss")) == 1200
    tracker.image("recon/grid", np.zeros((8, 8, 3), np.uint8), step=4)
    names = [one.path for one in client.list_artifacts(run_id)]
    assert "images" in names


def test_a_worker_attaches_and_does_not_end_the_run(tmp_path: Path, store: str) -> None:
    tracker = opened(tmp_path, store)
    for copy in (
        MLflowTracker.attach(store, str(tracker.run_id)),
        pickle.loads(pickle.dumps(tracker)),
    ):
        copy.metrics({"a": 1.0})
        copy.finish()
        assert tracker._client.get_run(tracker.run_id).info.status == "RUNNING"
    assert len(tracker._client.get_metric_history(tracker.run_id, "a")) == 2
    assert isinstance(tracker, Tracker)


def test_a_run_that_is_gone_is_made_anew(tmp_path: Path, store: str) -> None:
    first = opened(tmp_path, store)
    first._client.delete_run(first.run_id)
    assert opened(tmp_path, store).run_id != first.run_id


def test_off_and_stores_that_cannot_be(tmp_path: Path) -> None:
    assert isinstance(open_tracker(recipe(tmp_path, uri="off")), NullTracker)
    with pytest.raises(ConfigError, match=r"Set tracking\.uri"):
        open_tracker(Recipe.model_validate({"out": "memory://somewhere"}))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot be used.*Set tracking\.uri"):
        open_tracker(recipe(tmp_path / "out", uri=f"sqlite:///{tmp_path}/file/mlflow.db"))


def test_a_store_that_goes_away_stops_nothing_and_gets_all_when_it_is_back(
    tmp_path: Path, store: str, capsys: Any
) -> None:
    def sql(text: str) -> None:
        with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as database:
            database.execute(text)

    tracker = opened(tmp_path, store)
    tracker.metrics({"loss": 3.0}, step=1)
    tracker.flush()
    sql("ALTER TABLE runs RENAME TO away")
    try:
        tracker.metrics({"loss": 2.0}, step=2)
        tracker.flush()
        tracker.tags({"note": "kept"})
        assert isinstance(tracker.child("tokens"), NullTracker)
        copy = MLflowTracker.attach(store, str(tracker.run_id))
        copy.metrics({"lost": 1.0})
        copy.finish()
    finally:
        sql("ALTER TABLE away RENAME TO runs")
    tracker.finish()
    run = tracker._client.get_run(tracker.run_id)
    assert [m.value for m in tracker._client.get_metric_history(tracker.run_id, "loss")] == [
        3.0,
        2.0,
    ]
    assert run.data.tags["note"] == "kept" and run.info.status == "FINISHED"
    told = capsys.readouterr().err
    assert told.count("does not answer; entries are kept") == 2 and "tokens: not tracked" in told
    assert f"its run {tracker.run_id} lacks 1 numbers" in told and "answers again" in told


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2], "e": None}) == {
        "a.b": 1,
        "d": "[1, 2]",
        "e": None,
    }


def test_system_metrics_go_into_the_run(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setattr("smalti.workflows.tracking.mlflow.FLUSH_AFTER_S", 0.0)
    tracker = opened(tmp_path, store)
    until = time.monotonic() + 60
    with tracker.system_metrics():
        while (
            "system/cpu_utilization_percentage"
            not in tracker._client.get_run(tracker.run_id).data.metrics
        ):
            assert time.monotonic() < until
            time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]
