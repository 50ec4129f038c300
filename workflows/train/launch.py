"""The driver's side of a training run: starts Ray Train, shows progress, feeds the tracker, turns errors into one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from smalti import storage
from smalti.errors import SmaltiError, TrainingError
from smalti.progress import Progress, format_count
from smalti.workflows.train.board import Board
from smalti.workflows.train.elastic import elastic_trainer, fitting_workers, left_out
from smalti.workflows.train.loop import CHECKPOINTS, DONE_FILE, Job, train_worker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smalti.schema import Resources, Train
    from smalti.workflows.stage import StageRun

POLL_S = 0.5
QUIET = {  # read by Ray Train in the driver and its workers
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how late the end of a run is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}  # then look anew at how many there is room for


def fit(task: str, settings: Mapping[str, Any], train: Train, run: StageRun, *, seed: int) -> dict[str, float]:
    """Train `task` ("module:Class", made with `settings` in each worker) and write its final model into `run.path`.

    Returns the task's final numbers. A run that was broken off goes on from its newest checkpoint in
    `<path>/checkpoints`; one that is finished returns at once. Errors: the worker's own SmaltiError, else
    TrainingError with the first cause. Ray must be connected.
    """
    done_file = storage.join(run.path, DONE_FILE)
    if not storage.exists(done_file):
        fitting_workers(train, run.recipe.resources)
        _run(task, settings, train, run, seed)
    checkpoints = storage.join(run.path, CHECKPOINTS)
    if storage.exists(checkpoints):
        storage.remove(checkpoints)
    return {key: float(value) for key, value in storage.read_json(done_file)["metrics"].items()}


def _run(task: str, settings: Mapping[str, Any], train: Train, run: StageRun, seed: int) -> None:
    import ray
    from ray.train import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = run.recipe.resources
    for key, value in (QUIET if isinstance(resources.workers, int) else QUIET | ELASTIC).items():
        os.environ.setdefault(key, value)
    if len(ray.nodes()) == 1:  # an actor that waits for a node's notice: of no use when it is the driver's own node
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if told := left_out(train, resources):
        run.log(told)
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()  # not on a machine that may go
    job = Job(
        task=task,
        settings=dict(settings),
        train=train,
        seed=seed,
        path=run.path,
        cpus=resources.cpus_per_worker,
        gpus=resources.gpus_per_worker,
        board=board,
        preemptible=os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0",
    )
    watch = Watch(board, train, run)
    try:
        with run.tracker.system_metrics(), watch, _interruptible():
            result = _trainer(job, resources).fit()
    except TrainingFailedError as error:
        raise _one_error(error, board, run) from error
    finally:
        ray.kill(board)
    fatal = result.return_value["fatal"] if result.return_value else None
    if fatal is not None:
        raise fatal


def _trainer(job: Job, resources: Resources) -> Any:
    """The Ray Train trainer. It starts the workers and starts them again; what to go on from they find themselves."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = job.gpus > 0
    wanted: dict[str, float] = {"CPU": job.cpus} | ({"GPU": job.gpus} if use_gpu else {})
    scaling: dict[str, Any] = {"num_workers": resources.workers, "use_gpu": use_gpu, "resources_per_worker": wanted}
    failures = {"max_failures": max(1, job.train.max_failures), "max_preemption_failures": job.train.max_preemptions}
    failure: Any = FailureConfig
    settings: dict[str, Any] = {
        "train_loop_per_worker": train_worker,
        "train_loop_config": {"job": job},
        "torch_config": TorchConfig(backend="nccl" if use_gpu else "gloo"),
        "scaling_config": ScalingConfig(**scaling),
        "run_config": RunConfig(name=CHECKPOINTS, storage_path=job.path, failure_config=failure(**failures)),
    }
    if isinstance(resources.workers, int):
        return TorchTrainer(**settings)
    return elastic_trainer(fitting_workers(job.train, resources), **settings)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends a training as it ends everything else, by KeyboardInterrupt: Ray Train's own handler aborts the run
    by SystemExit, and would stay in place afterwards."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


class Watch:
    """Reads the board in a thread while the trainer runs: terminal progress, tracker metrics and pictures."""

    def __init__(self, board: Any, train: Train, run: StageRun) -> None:
        self.board, self.train, self.run = board, train, run
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.progress: Progress | None = None
        self.began = time.monotonic()
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()
        if self.error is not None and exc[0] is None:
            raise self.error

    def _watch(self) -> None:
        try:
            with ExitStack() as stack:
                while True:
                    ending = self.stop.is_set()
                    self._show(stack)
                    if ending:
                        return
                    self.stop.wait(POLL_S)
        except BaseException as error:  # raised in the driver's thread when the trainer is done
            self.run.log(f"progress and metrics stop here: {error}")
            self.error = error

    def _show(self, stack: ExitStack) -> None:
        """Pass on what the board holds; the bar opens when the workers are ready, so that its rate is theirs."""
        import ray

        metrics, pictures, started, lines = ray.get(self.board.take.remote())
        for line in lines:
            self.run.log(line)
        for step, workers in started:
            ready_s = time.monotonic() - self.began
            where = f", going on after step {step:,}" if step else ""
            self.run.log(f"{workers} worker(s) ready after {ready_s:.0f} s{where}")
            if self.progress is None:
                self.progress = stack.enter_context(Progress(self.train.steps, "steps", self.run.name, done=step))
        for step, numbers in metrics:
            self.run.tracker.metrics(numbers, step=step)
            told = {"loss": f"{numbers['loss']:.4g}"} if "loss" in numbers else {}
            if self.progress is not None:  # a restarted group repeats steps; the bar never runs backwards
                self.progress.update(max(0, step - self.progress.count), **told, **rates(numbers))
        for step, name, picture in pictures:
            self.run.tracker.image(name, picture, step=step)


def rates(numbers: Mapping[str, float]) -> dict[str, str]:
    """The throughput of a logged step, as the progress line shows it."""
    told = {"samples/s": f"{numbers['samples_per_s']:.0f}"}
    told |= {
        name.replace("_per_s", "/s"): format_count(value)
        for name, value in numbers.items()
        if name.endswith("_per_s") and name != "samples_per_s"
    }
    if "mfu" in numbers:
        told["MFU"] = f"{numbers['mfu']:.1%}"
    return told | {"waiting": f"{numbers['data_wait']:.0%}", "memory": f"{numbers['memory_gb']:.1f} GB"}


def _one_error(error: Exception, board: Any, run: StageRun) -> SmaltiError:
    """The one error that the user should see, out of Ray's."""
    import ray

    fatal = ray.get(board.fatal.remote())
    if fatal is not None:
        return fatal
    causes = [_cause(failure) for failure in getattr(error, "worker_failures", {}).values()]
    for cause in causes:
        if isinstance(cause, SmaltiError):
            return cause
    first = causes[0] if causes else _cause(getattr(error, "controller_failure", error))
    told = f"{type(first).__name__}: {first}".strip().splitlines()
    lines = [told[0]] if len(told) == 1 else [told[0], told[-1]]
    return TrainingError(
        f"Training in {run.path} failed, and failed again after restarts (train.max_failures): {' … '.join(lines)}\n"
        f"Ray's logs of the workers lie under /tmp/ray/session_latest/logs on their machines. The same command goes on "
        f"from the newest checkpoint in {storage.join(run.path, CHECKPOINTS)}."
    )


def _cause(failure: BaseException) -> BaseException:
    """The error under Ray's wrappers."""
    for _ in range(8):
        inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure.__cause__
        if not isinstance(inner, BaseException):
            return failure
        failure = inner
    return failure
