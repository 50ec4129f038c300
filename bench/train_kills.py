"""Faults: the toy of the tests trained while its workers, its driver and its nodes are killed,
against an unbroken run.

`python bench/train_kills.py [kills [kind …]]` (default: 5 of each kind). A run is killed at random
moments and resumes, by itself or by the same command; its loss curve must be that of the unbroken
run (to 1e-5 with the same number of workers, to 1e-4 with another), and each sample of an epoch
must have come exactly once. `node`: the raylet and all else of a node with a worker is killed, and
workers may be one or two; `fixed`: the same with two workers, which wait for the node that comes
half a minute later; `notice`: as `node`, half a minute after a notice; `grow`: a node comes.
`mllm`: no toy but the packed language model of the tests with `old_rows` under ZeRO-3, a worker of
which is killed in random steps. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from bench.machine import machine
from smalti.workflows.train.tasks.mllm import MllmTask

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "tests" / "workflows" / "toy_training.py"
SLOW_S, GROWING_S, STEPS, BATCH = 0.4, 2.0, 60, 8
CHANGES: dict[str, Any] = {
    "steps": STEPS,
    "checkpoint_every": 5,
    "log_every": 1,
    "max_failures": 99,
}


def load(path: Path) -> Any:
    """A file of the tests as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def curve(path: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def compare(toy: Any, path: Path, whole: Path) -> dict[str, float]:
    """Largest difference of the loss curves, and the steps that were taken again; AssertionError
    for a lost sample.
    """
    ours, theirs = curve(path), curve(whole)
    assert ours.keys() == theirs.keys(), (len(ours), len(theirs))
    again = toy.check_record(str(path / "record"), STEPS, BATCH)
    return {"loss": max(abs(ours[step] - theirs[step]) for step in theirs), "again": again}


@contextlib.contextmanager
def session(nodes: int | None = None) -> Iterator[Any]:
    """A Ray session of two CPUs, or of a head of one CPU and `nodes` more of one each (yields the
    cluster).
    """
    import ray
    from ray.cluster_utils import Cluster

    if nodes is None:
        ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", dashboard_host="127.0.0.1")
        try:
            yield None
        finally:
            ray.shutdown()
        return
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def train(
    toy: Any, path: Path, *, meddle: Callable[[Any], int] | None = None, **settings: Any
) -> int:
    """Train the toy into `path`, in a thread while `meddle(run)` does its harm here; how often it
    did.
    """
    workers = settings.pop("workers", 2)
    path.mkdir(parents=True, exist_ok=True)
    run = toy.FakeRun(str(path), workers)
    slow = {
        "slow_s": settings.pop("slow_s", SLOW_S if meddle else 0.0),
        "record": str(path / "record"),
    }
    with ThreadPoolExecutor(1) as pool:  # nodes can be added by the main thread alone
        training = pool.submit(
            toy.train, str(path), run=run, workers=workers, settings=slow, **CHANGES | settings
        )
        training.add_done_callback(lambda done: run.lines.append("trained"))
        done = meddle(run) if meddle else 0
        training.result()
    return done


def lines(run: Any, word: str) -> int:
    return sum(word in line for line in run.lines)


def wait_for(run: Any, word: str, count: int) -> bool:
    """Wait until `count` lines hold `word`; False when the run is over."""
    while lines(run, word) < count:
        if lines(run, "trained"):
            return False
        time.sleep(0.05)
    return True


def kill_workers(kills: int, rng: random.Random) -> Callable[[Any], int]:
    def meddle(run: Any) -> int:
        for kill in range(kills):
            if not wait_for(run, "worker(s) ready after", kill + 1):
                return kill
            time.sleep(rng.uniform(0.5, 6.0))
            found = [p for p in psutil.process_iter(["cmdline"]) if is_worker(p)]
            if not found:
                return kill
            rng.choice(found).kill()
        return kills

    return meddle


def is_worker(process: psutil.Process) -> bool:
    """A training worker of this very benchmark."""
    title = " ".join(process.info["cmdline"] or [])
    with contextlib.suppress(psutil.Error):
        return (
            "RayTrainWorker" in title
            and process.environ().get("SMALTI_KILLS") == os.environ["SMALTI_KILLS"]
        )
    return False


def take_nodes(
    cluster: Any, kills: int, rng: random.Random, notice_s: float | None = None, away_s: float = 0.0
) -> Callable[[Any], int]:
    """Remove the node of a worker, with notice or without, and add another `away_s` later; again
    when all resume.
    """

    def meddle(run: Any) -> int:
        for kill in range(kills):
            if not wait_for(run, "worker(s) ready after", kill + 1):
                return kill
            time.sleep(rng.uniform(1.0, 4.0))
            found = nodes_with_workers(cluster)
            if not found:
                return kill
            node = rng.choice(found)
            if notice_s is not None:
                give_notice(node.node_id, notice_s)
                if not wait_for(run, "saved at step", kill + 1):
                    return kill
            cluster.remove_node(node, allow_graceful=False)
            time.sleep(away_s)
            cluster.add_node(num_cpus=1)
        return kills

    return meddle


def nodes_with_workers(cluster: Any) -> list[Any]:
    """The nodes but for the head that a training worker runs on."""
    raylets = {process.ppid() for process in psutil.process_iter(["cmdline"]) if is_worker(process)}
    nodes = sorted(cluster.worker_nodes, key=lambda node: node.node_id)
    return [node for node in nodes if node.all_processes["raylet"][0].process.pid in raylets]


def add_node(cluster: Any) -> Callable[[Any], int]:
    """Add a node when the one there trains; whether both trained in the end."""

    def meddle(run: Any) -> int:
        wait_for(run, "worker(s) ready after", 1)
        cluster.add_node(num_cpus=1)
        return int(wait_for(run, "2 worker(s) ready after", 1))

    return meddle


def give_notice(node_id: str, seconds: float) -> None:
    """The notice of a cloud's agent that a spot node will be taken away."""
    import ray
    from ray.core.generated import autoscaler_pb2

    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client.drain_node(node_id, reason, "test", int((time.time() + seconds) * 1000))


def kill_driver(path: Path, kills: int, rng: random.Random) -> int:
    """The toy's own script, killed at random moments after steps that it logged, until it ends by
    itself.
    """
    logged = re.compile(r"toy: [1-9]\d*/")
    for kill in range(kills + 1):
        command = [
            sys.executable,
            str(TOY),
            str(path),
            str(SLOW_S),
            json.dumps(CHANGES | {"workers": 2}),
        ]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as running:
            assert running.stderr is not None
            for line in running.stderr:
                if logged.match(line) and kill < kills:
                    time.sleep(rng.uniform(0.0, 5.0))
                    os.kill(running.pid, signal.SIGKILL)
                    break
            running.wait()
        if running.returncode == 0:
            return kill
    raise RuntimeError("the toy did not end")


class Mortal(MllmTask):
    """The language model's task, a worker of which kills itself before the steps of `deaths` (step
    → rank), once each.
    """

    def __init__(self, deaths: dict[int, int], record: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.deaths, self.record = deaths, Path(record)

    def begin_step(self, step: int, engines: Any, read: Any) -> None:
        super().begin_step(step, engines, read)
        rank = self.context.collectives.rank
        mark = self.record / f"killed-{step}"
        if self.deaths.get(step) == rank and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            with open(self.record / "steps", "a") as file:
                file.write(f"{step}\n")


def kill_language_model(toy: Any, root: Path, kills: int, rng: random.Random) -> dict[str, float]:
    """A run unbroken, and one whose workers are killed; what `compare` finds, and how many were killed."""
    from smalti.workflows.train.launch import fit

    tasks, data = load(TOY.with_name("test_train_tasks.py")), root / "made"
    tasks.make_data(data)
    _, settings, train = tasks.jobs(data)["mllm"]
    section = settings["section"].model_copy(update={"old_rows": 0.25, "packing": True})
    train = train.model_copy(update=CHANGES | {"zero_stage": 3})
    deaths = {step: rng.randrange(2) for step in rng.sample(range(1, STEPS), kills)}
    curves, paths = [], [root / "mllm-whole", root / "mllm"]
    for path, dying in zip(paths, ({}, deaths), strict=True):
        (path / "record").mkdir(parents=True)
        more = {"section": section, "deaths": dying, "record": str(path / "record")}
        fit(Mortal, settings | more, train, toy.FakeRun(str(path), 2), seed=5)  # type: ignore[arg-type]
        curves.append(curve(path))
    whole, ours = curves
    assert whole.keys() == ours.keys() and len(ours) == STEPS
    taken = (paths[1] / "record" / "steps").read_text().split()
    killed = len(list((paths[1] / "record").glob("killed-*")))
    return {
        "kills": killed,
        "loss": max(abs(ours[step] - whole[step]) for step in whole),
        "again": len(taken) - STEPS,
    }


KINDS = ("worker-zero0", "worker-zero3", "driver", "node", "fixed", "notice", "grow", "mllm")
AWAY_S = 30.0


def main() -> None:
    kills, kinds = int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2:] or list(KINDS)
    rng, toy = random.Random(0), load(TOY)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["SMALTI_KILLS"] = str(os.getpid())  # seen again in the workers, which inherit it
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        whole = root / "whole"

        def note(kind: str, count: int) -> None:
            found[kind] = {"kills": count, **compare(toy, root / kind, whole)}
            print(kind, found[kind], flush=True)

        with session():
            if "mllm" in kinds:
                found["mllm"] = kill_language_model(toy, root, kills, rng)
                print("mllm", found["mllm"], flush=True)
            if kinds != ["mllm"]:
                train(toy, whole)
            for kind in ("worker-zero0", "worker-zero3"):
                if kind in kinds:
                    harm = kill_workers(kills, rng)
                    note(kind, train(toy, root / kind, meddle=harm, zero_stage=int(kind[-1])))
        if "driver" in kinds:
            note("driver", kill_driver(root / "driver", kills, rng))
        ways: dict[str, dict[str, float]] = {
            "node": {},
            "fixed": {"away_s": AWAY_S},
            "notice": {"notice_s": 30.0},
        }
        for kind, way in ways.items():
            if kind in kinds:
                with session(nodes=2) as cluster:
                    harm = take_nodes(cluster, kills, rng, **way)
                    workers = 2 if kind == "fixed" else (1, 2)
                    note(kind, train(toy, root / kind, meddle=harm, workers=workers, zero_stage=1))
        if "grow" in kinds:
            with session(nodes=0) as cluster:  # Ray looks for new nodes once a minute
                grown = train(
                    toy,
                    root / "grow",
                    meddle=add_node(cluster),
                    workers=(1, 2),
                    zero_stage=2,
                    slow_s=GROWING_S,
                )
                note("grow", grown)
    bounds = {kind: 1e-4 if kind in ("node", "notice", "grow") else 1e-5 for kind in found}
    met = all(result["loss"] <= bounds[kind] for kind, result in found.items())
    print(json.dumps({"goal": "kills", "kinds": found, "met": met, "machine": machine()}))


if __name__ == "__main__":
    main()
