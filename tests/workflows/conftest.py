"""What several test files here share: a web server, a Ray cluster, processes without start-up."""

from __future__ import annotations

import atexit
import http.server
import importlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from smalti.workflows.cluster.session import QUIET, quiet_ray_data
from smalti.workflows.corpus import scan
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.pipeline.timings import PROCESS_TALLY

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "mlflow.tracking",
    "pandas",
    "smalti.workflows.evaluation.stage",
    "smalti.workflows.train.launch",
    "smalti.workflows.train.tasks.encoder",
)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[type[http.server.SimpleHTTPRequestHandler]], str]]:
    """`serve(Handler)`: the address of a web server of the test's folder, until the test ends."""
    with ExitStack() as ends:

        def served(handler: type[http.server.SimpleHTTPRequestHandler]) -> str:
            here = http.server.ThreadingHTTPServer(
                ("127.0.0.1", 0), partial(handler, directory=str(tmp_path))
            )
            thread = threading.Thread(target=here.serve_forever, args=(0.05,), daemon=True)
            ends.enter_context(here)
            thread.start()
            ends.callback(thread.join)
            ends.callback(here.shutdown)
            return f"http://127.0.0.1:{here.server_address[1]}"

        yield served


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus stage's workers in this process, one after the other: for what does not depend on
    Ray.
    """

    def here(
        items: Any, worker: Any, args: Any, resources: Any, *, model: bool, tally: Any
    ) -> Iterator[Any]:
        made = worker(*args)
        for item in items:
            result = made.work(made.read(item))
            tally.add(PROCESS_TALLY.drain())
            yield result

    monkeypatch.setattr(scan, "run_shards", here)
    monkeypatch.setattr(corpus, "ensure_ray", lambda recipe: nullcontext())


@pytest.fixture(scope="session")
def ray_node(
    preloaded: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Arguments of a node of `ray.cluster_utils.Cluster` whose workers start without imports.

    They are forked from a process that has imported torch and transformers. Started by Ray, each takes
    one to six CPU seconds. Ray's own way is taken in test_jobs.py and test_fourth_system.py.
    """
    folder = tempfile.mkdtemp(prefix="rayworkers")  # short: paths of sockets are
    address = os.path.join(folder, "socket")
    preloaded.submit(_serve_workers, address).result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("SMALTI_WORKER_SERVER", address)
        for key, value in QUIET.items():
            patch.setenv(key, value)
        script = str(Path(__file__).with_name("ray_worker.py"))
        yield {"setup_worker_path": script, "object_store_memory": 2**28}
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def ray_address(ray_node: dict[str, Any]) -> Iterator[str]:
    """Address of a Ray cluster of one node that all tests of this process share.

    It has four CPUs, however many there are.
    """
    from ray.cluster_utils import Cluster

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dashboard = {"include_dashboard": True, "dashboard_port": probe.getsockname()[1]}
    cluster = Cluster(initialize_head=True, head_node_args=ray_node | {"num_cpus": 4} | dashboard)
    yield cluster.address
    cluster.shutdown()


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """This process as a driver of a cluster."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def on_ray(ray_address: str) -> Iterator[None]:
    """This process as a driver of the shared cluster, for the tests of one file."""
    with _connected(ray_address):
        yield


@pytest.fixture(scope="module")
def on_ray_with_gpu(ray_node: dict[str, Any]) -> Iterator[None]:
    """As `on_ray`, on a cluster of its own that believes it has a GPU: nothing computes on one."""
    from ray.cluster_utils import Cluster

    node = ray_node | {"num_cpus": 4, "num_gpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        with _connected(cluster.address):
            yield
    finally:
        cluster.shutdown()


@pytest.fixture(scope="session")
def as_driver(ray_address: str) -> dict[str, str]:
    """Environment of a process that uses the shared cluster, as a job does: it uploads no code."""
    own = {"RAY_ADDRESS": ray_address, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    return {**os.environ, **own, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def _preload() -> None:
    """Import what commands and workers need, but for Ray.

    It reads the environment of the process, such as a worker's job, when it is imported.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in PRELOADED:
        importlib.import_module(name)
    from smalti.workflows.train import engines

    engines.prepare_process(False, 1)
    assert "ray" not in sys.modules


def _start(arguments: list[str], output: str, environment: dict[str, str]) -> int:
    """In the preloaded process: `python ARGUMENTS…` in a child; its pid."""
    pid = os.fork()
    if not pid:
        os.setsid()
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        _become(arguments, environment, str(ROOT), file, file)
    return pid


def _serve_workers(address: str) -> None:
    """In the preloaded process: a child that forks a Ray worker at each call of `ray_worker.py`."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(64)
    if os.fork():
        server.close()
        return
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none of them is waited for
    server.settimeout(1)
    try:
        while os.getppid() == parent:
            with suppress(TimeoutError):
                _fork_worker(server.accept()[0])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _worker_command(request: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a worker, as Ray's `setup_worker.py` makes them.

    RAY_ADDRESS is added: Ray Train looks for its controller in the newest cluster of the machine,
    and removes the placement group of a training that it does not find there.
    """
    own = ("--serialized-runtime-env-context=", "--language=")
    options = dict(argument.partition("=")[::2] for argument in request["arguments"])
    context = json.loads(options.get("--serialized-runtime-env-context") or "{}")
    assert not context.get("command_prefix"), "the shared cluster takes variables alone"
    arguments = [argument for argument in request["arguments"] if not argument.startswith(own)]
    address = {"RAY_ADDRESS": options["--gcs-address"]}
    return arguments, request["environment"] | address | (context.get("env_vars") or {})


def _fork_worker(client: socket.socket) -> None:
    with client:
        client.settimeout(None)
        _, files, _, _ = socket.recv_fds(client, 1, 2)
        request = json.loads(b"".join(iter(partial(client.recv, 2**16), b"")))
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            client.close()
            _become(*_worker_command(request), request["cwd"], *files)
        client.send(b"x")
    for file in files:
        os.close(file)


def _become(
    arguments: list[str], environment: dict[str, str], cwd: str, stdout: int, stderr: int
) -> NoReturn:
    """In a child: be `python ARGUMENTS…`."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        random.seed()
        code = _python(arguments)
        atexit._run_exitfuncs()
    finally:
        os._exit(code)


def _python(arguments: list[str]) -> int:
    """Run `-m MODULE …`, `-c CODE …` or `FILE …` as `python` does; the exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _exit_code(pid: int, wait: bool) -> int | None:
    """In the process that has imported the libraries: how a child ended; None while it runs."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


@dataclass(frozen=True)
class Running:
    """A command that was started, a child of `server`."""

    server: ProcessPoolExecutor
    pid: int
    output: Path

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.server.submit(_exit_code, self.pid, False).result()

    def wait(self) -> int:
        """The exit code, at its end."""
        code = self.server.submit(_exit_code, self.pid, True).result()
        assert code is not None
        return code

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL


@pytest.fixture(scope="session")
def preloaded() -> Iterator[ProcessPoolExecutor]:
    """A process that has imported the libraries, to fork from."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_preload) as server:
        yield server


@pytest.fixture(scope="session")
def start(
    preloaded: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str], dict[str, str]], Running]:
    """`start(arguments, environment)`: `python ARGUMENTS…` in a process of its own, in the root.

    It is forked: importing torch, transformers and Ray takes seven seconds.
    """

    def started(arguments: list[str], environment: dict[str, str]) -> Running:
        output = tmp_path_factory.mktemp("command") / "output"
        pid = preloaded.submit(_start, arguments, str(output), environment).result()
        return Running(preloaded, pid, output)

    return started


def _rank(
    work: Callable[..., Any], arguments: tuple[Any, ...], store: str, rank: int, world_size: int
) -> Any:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()


def _fork(
    work: Callable[..., Any], arguments: tuple[Any, ...], store: str, world_size: int
) -> list[Any]:
    """In the process that is kept for it: DeepSpeed is imported once, not in each of its children."""
    from smalti.workflows.train import engines

    engines.prepare_process(False, 1)
    with multiprocessing.get_context("fork").Pool(world_size) as pool:
        tasks = [(work, arguments, store, rank, world_size) for rank in range(world_size)]
        return pool.starmap(_rank, tasks, chunksize=1)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """`ranks(work, world_size, *arguments)`: what `work(*arguments)` returns on each rank of a
    group of new processes, in rank order.

    DeepSpeed holds one process group a process.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as server:

        def run(work: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
            store: Path = tmp_path_factory.mktemp("store") / "file"
            return server.submit(_fork, work, arguments, str(store), world_size).result()

        yield run
