"""The line about failed workers, and errors that are not reported twice."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from smalti.errors import DataError
from smalti.schema import Resources, Train
from smalti.workflows.train.failures import cause_of, failed_workers
from smalti.workflows.train.job import TrainingJob
from smalti.workflows.train.launch import _trainer

RESET = RuntimeError("Connection reset by peer\nand more\nGood luck")


def test_a_worker_that_died_is_named_before_those_that_lost_it() -> None:
    gone = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    line = failed_workers({0: RESET, 2: gone})
    assert line.startswith("worker(s) 2 died: ActorDiedError: ")
    assert failed_workers({1: RESET, 0: RESET}) == (
        "worker(s) 0, 1 failed: RuntimeError: Connection reset by peer … Good luck"
    )
    assert len(failed_workers({0: RuntimeError("x" * 999)})) < 250


def test_no_failure_is_survived_where_none_is_allowed() -> None:
    job = TrainingJob("x:Y", {}, Train(max_failures=0), 0, "/nowhere", 1, 0, channel=None)
    failures = _trainer(job, Resources()).run_config.failure_config
    assert (failures.max_failures, failures.max_preemption_failures) == (0, -1)


def test_what_the_user_sees_at_the_end_is_not_reported_before() -> None:
    wrapped = RayTaskError("work", "remote traceback", DataError("shard 3 is torn"))
    assert isinstance(cause_of(wrapped), DataError)
    assert failed_workers({0: wrapped, 1: RESET}) == ""
