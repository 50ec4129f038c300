"""MLflow behind the `Tracker` protocol: one run per recipe, a child run per stage.

The default store is `sqlite:///<out>/mlflow.db` with its pictures in `<out>/mlflow_artifacts`;
`tracking.uri` names another one, and `off` disables tracking. Metrics are buffered and sent in
batches; a training worker attaches to the run that the driver created, so that a restarted worker
does not open another one. Only one process per run should write. A store that cannot be used when a
recipe starts is an error; one that fails later does not stop the run (see `outbox`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from smalti import storage
from smalti.errors import ConfigError
from smalti.progress import log
from smalti.tracking import NullTracker, Status, Tracker
from smalti.workflows.tracking.outbox import Outbox

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from smalti.schema import Recipe

RUN_FILE = "mlflow_run.json"
METRICS_A_BATCH = 1000  # the store's limits, seen in mlflow 3.17 (mlflow/utils/validation.py)
PARAMS_A_BATCH = 100
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
FLUSH_AFTER_S = 5.0
SYSTEM_EVERY_S = 10.0
PARENT_TAG = "mlflow.parentRunId"
# the outbox retries
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one level with dotted keys.

    Lists become JSON; an empty mapping is dropped.
    """
    flat: dict[str, object] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def open_tracker(recipe: Recipe) -> Tracker:
    """The recipe's parent run; `NullTracker` when tracking is off.

    It is created once and reopened when the recipe runs again; its id is kept in
    `<out>/mlflow_run.json`.

    Raises:
        ConfigError: if the store cannot be used, or `out` is a URL and no tracking URI was given
            (sqlite needs a local
            folder).
    """
    uri = recipe.tracking.uri
    if uri == "off":
        return NullTracker()
    out = storage.absolute(recipe.out)
    if uri is None:
        if not storage.is_local(out):
            raise ConfigError(
                "tracking.uri is not set, and its default, a sqlite file in the output folder, "
                f"cannot lie in {out}. Set tracking.uri to a server, to sqlite:///<a local file>, "
                "or to off."
            )
        storage.make_dirs(out)
        uri = f"sqlite:///{out}/mlflow.db"
    record_path = storage.join(out, RUN_FILE)
    record = storage.read_json(record_path) if storage.exists(record_path) else {}
    try:
        client = _client(uri)
        run_id = _reopen(client, record.get("run_id")) if record.get("uri") == uri else None
        if run_id is None:
            experiment = _experiment(client, uri, recipe.tracking.experiment)
            run_id = client.create_run(
                experiment, run_name=recipe.name, tags={"smalti.out": out}
            ).info.run_id
            storage.write_json(record_path, {"uri": uri, "run_id": run_id})
    except ConfigError:
        raise
    except Exception as error:  # mlflow lets SQLAlchemy's, requests' and its own errors through
        raise ConfigError(
            f"The MLflow store {uri} cannot be used: {error}. Set tracking.uri to a store that "
            "answers, or to off."
        ) from error
    tracker = MLflowTracker(uri, run_id, client=client)
    tracker.params(recipe.model_dump(mode="json"))
    return tracker


class MLflowTracker:
    """One MLflow run.

    With `owner=False` (see `attach`), `finish` sends the buffer and leaves the run open. A pickled
    copy is attached: it may be passed to rank 0 of a training.
    """

    run_id: str | None

    def __init__(
        self, uri: str, run_id: str, *, client: MlflowClient | None = None, owner: bool = True
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._run_id = run_id
        self.owner = owner
        self._client = client or _client(uri)
        self._outbox = Outbox(uri, self._send_numbers, METRICS_A_BATCH)

    def _send_numbers(self, numbers: list[Metric]) -> None:
        self._client.log_batch(self._run_id, metrics=numbers)

    @classmethod
    def attach(cls, uri: str, run_id: str) -> MLflowTracker:
        """The same run in another process, which does not end it."""
        return cls(uri, run_id, owner=False)

    def __reduce__(self) -> tuple[Callable[[str, str], MLflowTracker], tuple[str, str]]:
        return MLflowTracker.attach, (self.uri, self._run_id)

    def params(self, values: Mapping[str, object]) -> None:
        """Log nested settings with dotted keys.

        MLflow does not change the value of a logged parameter; a new value (a rerun may change
        resources) is written as the tag `changed.<key>`.
        """
        self._outbox.call(partial(self._params, dict(values)))

    def _params(self, values: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        wanted = {key: str(value)[:PARAM_LENGTH] for key, value in flatten(values).items()}
        new = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(new), PARAMS_A_BATCH):
            self._client.log_batch(self._run_id, params=new[start : start + PARAMS_A_BATCH])
        self._tags(
            {
                f"changed.{key}": value
                for key, value in wanted.items()
                if known.get(key, value) != value
            }
        )

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Buffer metrics.

        They are sent once a batch is full, or by the first call after 5 seconds.
        """
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        numbers = [Metric(key, float(value), now_ms, step or 0) for key, value in values.items()]
        self._outbox.add(numbers, FLUSH_AFTER_S)

    def flush(self) -> None:
        """Send the buffer."""
        self._outbox.flush(now=True)

    def image(self, key: str, pixels: np.ndarray, step: int | None = None) -> None:
        """Log a picture, uint8 (H, W, 3), to the series `key`."""
        log_image = self._client.log_image
        self._outbox.call(
            partial(log_image, self._run_id, pixels, key=key, step=step or 0, synchronous=True)
        )

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Log CPU, memory, disk, network and GPUs every 10 seconds as `system/…`."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        class Monitor(SystemMetricsMonitor):
            """MLflow's monitor; its own loop ends at the first unanswered call."""

            def monitor(inner) -> None:  # noqa: N805
                while True:
                    inner.collect_metrics()
                    if inner._shutdown_event.wait(inner.sampling_interval):
                        return
                    numbers = {
                        f"system/{name}": value for name, value in inner.aggregate_metrics().items()
                    }
                    self.metrics(numbers, step=inner._logging_step)
                    inner._logging_step += 1
                    for part in inner.monitors:
                        part.clear_metrics()

        monitor = Monitor(self._run_id, SYSTEM_EVERY_S, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def tags(self, values: Mapping[str, str]) -> None:
        self._outbox.call(partial(self._tags, dict(values)))

    def _tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, str(value)[:TAG_LENGTH]) for key, value in values.items()]
        for start in range(0, len(tags), PARAMS_A_BATCH):
            self._client.log_batch(self._run_id, tags=tags[start : start + PARAMS_A_BATCH])

    def child(self, name: str) -> Tracker:
        """A child run; an unfinished one of that name is resumed.

        If the store does not answer, that is logged and the stage is not tracked.
        """
        try:
            return self._child(name)
        except Exception as error:  # mlflow lets SQLAlchemy's, requests' and its own errors through
            log(
                f"{name}: not tracked, as MLflow at {self.uri} does not answer: "
                f"{str(error).strip().splitlines()[0]}"
            )
            return NullTracker()

    def _child(self, name: str) -> MLflowTracker:
        info = self._client.get_run(self._run_id).info
        query = f"tags.`{PARENT_TAG}` = '{self._run_id}' and attributes.run_name = '{name}'"
        for run in self._client.search_runs([info.experiment_id], query):
            if run.info.status != "FINISHED":
                self._client.update_run(run.info.run_id, status="RUNNING")
                return MLflowTracker(self.uri, run.info.run_id, client=self._client)
        run = self._client.create_run(
            info.experiment_id, run_name=name, tags={PARENT_TAG: self._run_id}
        )
        return MLflowTracker(self.uri, run.info.run_id, client=self._client)

    def finish(self, status: Status = "FINISHED") -> None:
        """Send the buffer and end the run; log what was not sent."""
        if self.owner:
            self._outbox.call(partial(self._client.set_terminated, self._run_id, status))
        if not self._outbox.flush(now=True):
            log(
                f"MLflow at {self.uri} does not answer; its run {self._run_id} lacks "
                f"{self._outbox.left()}. Nothing else is lost: the metrics of a training are in "
                "its history.jsonl, those of a stage in its artifact.json."
            )


def _client(uri: str) -> MlflowClient:
    """A client without telemetry and without migration logs."""
    for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **PATIENCE}.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def _reopen(client: MlflowClient, run_id: str | None) -> str | None:
    """Reopen a run; None if the store no longer has it."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if run.info.lifecycle_stage != "active":
        return None
    client.update_run(run_id, status="RUNNING")
    return run_id


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment, created if it is missing.

    A sqlite store keeps pictures beside its file; MLflow's default is the working directory.
    """
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(name)
    if known is None:
        location = None
        if uri.startswith("sqlite:///"):
            location = (
                Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow_artifacts"
            ).as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another process was faster
            known = client.get_experiment_by_name(name)
            if known is None:
                raise
    if known.lifecycle_stage != "active":
        raise ConfigError(
            f"The MLflow experiment {name!r} in {uri} is deleted. Restore it with `mlflow "
            "experiments restore`, or set tracking.experiment to another name."
        )
    return known.experiment_id
