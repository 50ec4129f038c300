"""Fixtures of several test files here."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from smalti.workflows.corpus import scan
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.pipeline.timings import HERE


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
            tally.add(HERE.drain())
            yield result

    monkeypatch.setattr(scan, "run_shards", here)
    monkeypatch.setattr(corpus, "ensure_ray", lambda recipe: nullcontext())


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
