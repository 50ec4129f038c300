"""The driver's side of a training run: start Ray Train, show progress, raise one error."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from smalti import storage
from smalti.errors import SmaltiError, TrainingError
from smalti.workflows.train.driver_channel import ChannelHandle, DriverChannel
from smalti.workflows.train.elastic import elastic_trainer, fitting_workers, unused_workers
from smalti.workflows.train.failures import brief, cause_of, failed_workers
from smalti.workflows.train.job import TrainingJob
from smalti.workflows.train.loop import CHECKPOINTS, DONE_FILE
from smalti.workflows.train.progress_monitor import ProgressMonitor
from smalti.workflows.train.worker import train_worker

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from smalti.schema import Resources, Train
    from smalti.workflows.pipeline.stage import StageRun
    from smalti.workflows.train.task import Task

QUIET = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how late the end of a run is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
"""Environment of Ray Train, in the driver and its workers."""
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
ALONE = {WATCHER: "0"}
"""On a single node the watcher could only wait for a notice of the driver's own node."""
ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}
"""With a range of workers: when to count again how many there is room for."""


def fit(
    task: type[Task], settings: Mapping[str, object], train: Train, run: StageRun, *, seed: int
) -> dict[str, float]:
    """Train a task and write its final model into `run.path`; Ray must be connected.

    An interrupted run resumes from its newest checkpoint in `<path>/checkpoints`; one that is
    finished returns at once.

    Args:
        task: created in each worker.
        settings: keyword arguments of the task.
        train: the recipe's settings of this training.
        run: the stage.
        seed: of the training.

    Returns:
        The task's final numbers.

    Raises:
        SmaltiError: the worker's own.
        TrainingError: the first cause, if it is another.
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
    task: type[Task], settings: Mapping[str, object], train: Train, run: StageRun, seed: int
) -> None:
    import ray
    from ray.train import TrainingFailedError

    resources = run.recipe.resources
    environment = _environment_for(resources)
    if line := unused_workers(train, resources):
        run.log(line)
    channel = _start_channel()
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
    monitor = ProgressMonitor(channel, train, run)
    try:
        with _environment(environment), run.tracker.system_metrics(), monitor, _interruptible():
            result: Any = _trainer(job, resources).fit()
    except TrainingFailedError as error:
        raise _one_error(error, channel, run) from error
    finally:
        ray.kill(channel)  # type: ignore[arg-type]
    fatal = result.return_value["fatal"] if result.return_value else None
    if fatal is not None:
        raise fatal


def _environment_for(resources: Resources) -> dict[str, str]:
    """Environment of Ray Train for these resources and this cluster."""
    import ray

    if not isinstance(resources.workers, int):
        return QUIET | ELASTIC
    alone = len(ray.nodes()) == 1 and not os.environ.get("RAY_ADDRESS")
    return QUIET | ALONE if alone else QUIET


def _start_channel() -> ChannelHandle:
    """A DriverChannel on the driver's node: others may be taken away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node_id = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    channel: Any = ray.remote(DriverChannel)
    return channel.options(num_cpus=0, scheduling_strategy=strategy).remote()


def _trainer(job: TrainingJob, resources: Resources) -> TorchTrainer:
    """The Ray Train trainer, which starts the workers and restarts them after failures.

    The workers find the checkpoint to resume from themselves.
    """
    import ray.train.torch

    api: Any = ray.train  # typed as Ray Train v1, but v2 at run time
    channel = job.channel

    class ReportFailures(ray.train.UserCallback):
        """Reports why workers restart."""

        def after_exception(
            self, run_context: TrainRunContext, worker_exceptions: dict[int, Exception]
        ) -> None:
            channel.failed.remote(failed_workers(worker_exceptions))

    use_gpu = job.gpus > 0
    per_worker: dict[str, float] = {"CPU": job.cpus}
    if use_gpu:
        per_worker["GPU"] = job.gpus
    scaling = api.ScalingConfig(
        num_workers=resources.workers, use_gpu=use_gpu, resources_per_worker=per_worker
    )
    failures = api.FailureConfig(
        max_failures=job.train.max_failures, max_preemption_failures=job.train.max_preemptions
    )
    run_config = api.RunConfig(
        name=CHECKPOINTS,
        storage_path=job.path,
        failure_config=failures,
        callbacks=[ReportFailures()],
    )
    torch_config = api.torch.TorchConfig(backend="nccl" if use_gpu else "gloo")
    work = partial(train_worker, job)
    if isinstance(resources.workers, int):
        return api.torch.TorchTrainer(
            work, torch_config=torch_config, scaling_config=scaling, run_config=run_config
        )
    fitting = fitting_workers(job.train, resources)
    return elastic_trainer(fitting, channel, work, torch_config, scaling, run_config)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Within, the environment has these values where the user set none.

    The next training may need others.
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
    """Make Ctrl-C raise KeyboardInterrupt, as elsewhere.

    Ray Train's own handler ends the run by SystemExit, and would stay in place afterwards.
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


def _one_error(error: Exception, channel: ChannelHandle, run: StageRun) -> SmaltiError:
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
        f"Training in {run.path} failed more often than it is restarted (train.max_failures, "
        f"max_preemptions): {brief(first)}\n"
        "Ray's logs of the workers are under /tmp/ray/session_latest/logs on their nodes. Run the "
        "same command again to resume from the newest checkpoint in "
        f"{storage.join(run.path, CHECKPOINTS)}."
    )
