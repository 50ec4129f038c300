"""What several test files here share: a web server, a Ray cluster, processes without start-up."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from smalti.workflows.cluster.session import QUIET, quiet_ray_data
from smalti.workflows.corpus import scan
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.pipeline.timings import PROCESS_TALLY

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[type[http.server.SimpleHTTPRequestHandler]], str]]:
    """`serve(Handler)`: the address of a web server of the test's folder, until the test ends."""
    with ExitStack() as ends:

        def served(handler: type[http.server.SimpleHTTPRequestHandler]) -> str:
            here = http.server.ThreadingHTTPServer(
                ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path))
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
def ray_address() -> Iterator[str]:
    """Address of a Ray cluster of one node that all tests of this process share.

    Starting one costs eight CPU seconds. It has four CPUs, however many there are.
    """
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "object_store_memory": 2**28, "include_dashboard": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where workers find smalti
        for key, value in QUIET.items():
            patch.setenv(key, value)
        cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def on_ray(ray_address: str) -> Iterator[None]:
    """This process as a driver of the shared cluster, for the tests of one file."""
    import ray

    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    quiet_ray_data()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def as_driver(ray_address: str) -> dict[str, str]:
    """Environment of a process that uses the shared cluster, as a job does: it uploads no code."""
    own = {"RAY_ADDRESS": ray_address, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    return {**os.environ, **own, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def _start(arguments: list[str], output: str, environment: dict[str, str]) -> int:
    """In the process that has imported the libraries: `python ARGUMENTS…` in a child; its pid."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import mlflow.tracking  # noqa: F401
    import ray.data  # noqa: F401

    import smalti.workflows.evaluation.stage  # noqa: F401

    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(ROOT)
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = _python(arguments)
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
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """`start(arguments, environment)`: `python ARGUMENTS…` in a process of its own, in the root.

    It is forked from one that has imported torch, transformers and Ray: these take seven seconds.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as server:

        def started(arguments: list[str], environment: dict[str, str]) -> Running:
            output = tmp_path_factory.mktemp("command") / "output"
            pid = server.submit(_start, arguments, str(output), environment).result()
            return Running(server, pid, output)

        yield started


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
