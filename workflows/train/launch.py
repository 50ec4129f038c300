"""The driver's side of a training run: starts Ray Train, shows progress, feeds the tracker, turns
errors into one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from smalti import storage
from smalti.errors import SmaltiError, TrainingError
from smalti.workflows.train.driver_channel import DriverChannel
from smalti.workflows.train.elastic import elastic_trainer, fitting_workers, left_out
from smalti.workflows.train.failures import brief, cause_of, failed_workers
from smalti.workflows.train.job import TrainingJob
from smalti.workflows.train.loop import CHECKPOINTS, DONE_FILE
from smalti.workflows.train.progress_monitor import ProgressMonitor
from smalti.workflows.train.worker import train_worker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smalti.schema import Resources, Train
    from smalti.workflows.pipeline.stage import StageRun
    from smalti.workflows.train.task import Task

QUIET = {  # read by Ray Train in the driver and its workers
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how late the end of a run is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
ALONE = {
    WATCHER: "0"
}  # an actor that waits for a node's notice: of no use when it is the driver's own node
ELASTIC = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"
}  # then look anew at how many there is room for


def fit(
    task: type[Task], settings: Mapping[str, Any], train: Train, run: StageRun, *, seed: int
) -> dict[str, float]:
    """Train a task, made with `settings` in each worker, and write its final model into `run.path`.

    Returns the task's final numbers. A run that was broken off goes on from its newest checkpoint
    in `<path>/checkpoints`; one that is finished returns at once. Errors: the worker's own
    SmaltiError, else TrainingError with the first cause. Ray must be connected.
    """
    done_file = storage.join(run.path, DONE_FILE)
    if not storage.exists(done_file):
        fitting_workers(train, run.recipe.resources)
        _run(task, settings, train, run, seed)
    checkpoints = storage.join(run.path, CHECKPOINTS)
    if storage.exists(checkpoints):
        storage.remove(checkpoints)
    return {key: float(value) for key, value in storage.read_json(done_file)["metrics"].items()}


def _run(
    task: type[Task], settings: Mapping[str, Any], train: Train, run: StageRun, seed: int
) -> None:
    import ray
    from ray.train import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = run.recipe.resources
    alone = (
        len(ray.nodes()) == 1
        and isinstance(resources.workers, int)
        and not os.environ.get("RAY_ADDRESS")
    )
    environment = (
        QUIET | ({} if isinstance(resources.workers, int) else ELASTIC) | (ALONE if alone else {})
    )
    if told := left_out(train, resources):
        run.log(told)
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    channel: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(
        DriverChannel
    ).remote()  # not on a machine that may go
    job = TrainingJob(
        task=task,
        settings=dict(settings),
        train=train,
        seed=seed,
        path=run.path,
        cpus=resources.cpus_per_worker,
        gpus=resources.gpus_per_worker,
        channel=channel,
        preemptible=os.environ.get(WATCHER, environment.get(WATCHER, "1")) != "0",
        elastic=not isinstance(resources.workers, int),
    )
    watch = ProgressMonitor(channel, train, run)
    try:
        with _environment(environment), run.tracker.system_metrics(), watch, _interruptible():
            result = _trainer(job, resources).fit()
    except TrainingFailedError as error:
        raise _one_error(error, channel, run) from error
    finally:
        ray.kill(channel)
    fatal = result.return_value["fatal"] if result.return_value else None
    if fatal is not None:
        raise fatal


def _trainer(job: TrainingJob, resources: Resources) -> Any:
    """The Ray Train trainer.

    It starts the workers and starts them again; what to go on from they find themselves.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    channel = job.channel

    class Tell(UserCallback):
        """Says why workers start again."""

        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            channel.failed.remote(failed_workers(worker_exceptions))

    use_gpu = job.gpus > 0
    wanted: dict[str, float] = {"CPU": job.cpus} | ({"GPU": job.gpus} if use_gpu else {})
    scaling: dict[str, Any] = {
        "num_workers": resources.workers,
        "use_gpu": use_gpu,
        "resources_per_worker": wanted,
    }
    failures = {
        "max_failures": job.train.max_failures,
        "max_preemption_failures": job.train.max_preemptions,
    }
    failure: Any = FailureConfig
    told: Any = [Tell()]
    settings: dict[str, Any] = {
        "train_loop_per_worker": partial(train_worker, job),
        "torch_config": TorchConfig(backend="nccl" if use_gpu else "gloo"),
        "scaling_config": ScalingConfig(**scaling),
        "run_config": RunConfig(
            name=CHECKPOINTS,
            storage_path=job.path,
            failure_config=failure(**failures),
            callbacks=told,
        ),
    }
    if isinstance(resources.workers, int):
        return TorchTrainer(**settings)
    return elastic_trainer(fitting_workers(job.train, resources), job.channel, **settings)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Within, the environment has these values where the user set none; the next training may want
    others.
    """
    ours = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends a training as it ends everything else, by KeyboardInterrupt: Ray Train's own
    handler aborts the run by SystemExit, and would stay in place afterwards.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _one_error(error: Exception, channel: Any, run: StageRun) -> SmaltiError:
    """The one error that the user should see, out of Ray's."""
    import ray

    fatal = ray.get(channel.fatal.remote())
    if fatal is not None:
        return fatal
    causes = [cause_of(failure) for failure in getattr(error, "worker_failures", {}).values()]
    for cause in causes:
        if isinstance(cause, SmaltiError):
            return cause
    first = causes[0] if causes else cause_of(getattr(error, "controller_failure", error))
    return TrainingError(
        f"Training in {run.path} failed more often than it is started again (train.max_failures, max_preemptions): {brief(first)}\n"
        f"Ray's logs of the workers lie under /tmp/ray/session_latest/logs on their machines. The same command goes on "
        f"from the newest checkpoint in {storage.join(run.path, CHECKPOINTS)}."
    )
