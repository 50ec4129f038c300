"""Restart proof: corpus, features and tokens through SIGKILLs at random moments, byte for byte what
an unbroken run makes.

`python bench/kills.py [RUNS [SEED [FOLDER]]]` (30, 0, a temporary one; a folder keeps the unbroken
run for a next time). A cluster of two nodes on this machine. In each run one stage, in turn, is
struck three times, in random order and at random moments (shares of its files): its driver, one of
its actors, and the raylet of the second node die by SIGKILL. A dead driver's command is started
again; a dead node is replaced or, by a coin, not. Compared are all files, and the record apart from
times and counts of what was done again. Ctrl-C ends it after the runs so far. The last line is
JSON; `quality` is the share of equal artifacts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from bench.machine import machine
from bench.pictures import save_encoder, save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STAGES, KINDS = ("corpus", "features", "tokens"), ("driver", "actor", "raylet")
RECORD, PARTIAL = "artifact.json", "artifact.partial.json"
IMAGES, SHARD, PIXELS = 960, 8, 64
LIMIT_S, DELAY_S = 900, 0.1
# a busy machine starts slowly
PATIENT = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
}
# The workers find the code by the nodes' PYTHONPATH: nodes on one machine share the folder of
# uploaded code, and one that dies takes it away from the other. As in a job, the driver uploads
# nothing.
NO_UPLOAD = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {}}'}


def recipe(folder: str, out: str) -> str:
    """A recipe file: 120 shards, two actors, two readers."""
    path = Path(folder, f"{Path(out).name}.yaml")
    path.write_text(
        f"out: {out}\ntracking: {{uri: 'off'}}\nencoder: {{pretrained: {folder}/encoder}}\n"
        f"corpus: {{source: 'generated:{IMAGES}', image_size: {PIXELS}, shard_images: {SHARD}, val_fraction: 0.2}}\n"
        "resources: {actors: 2, readers: 2}\n"
    )
    return str(path)


APART = ("seconds", "created", "code_version")


def digest(artifact: Path) -> str:
    """A hash of all files of an artifact, and of its record without times, version of the code, and
    what was done again.
    """
    whole = hashlib.sha256()
    for path in sorted(path for path in artifact.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == RECORD:
            record = json.loads(data)
            record = {name: value for name, value in record.items() if name not in APART}
            record["scores"] = {
                name: value
                for name, value in record["scores"].items()
                if not name.startswith(("seconds/", "retried/", "left_out/"))
            }
            data = json.dumps(record, sort_keys=True).encode()
        whole.update(f"{path.relative_to(artifact)} {hashlib.sha256(data).hexdigest()}\n".encode())
    return whole.hexdigest()


def node_settings() -> dict[str, int]:
    """One core.

    With the agents' ports given a raylet does not end when they take long to start on a busy
    machine.
    """
    names = (
        "metrics_agent_port",
        "metrics_export_port",
        "runtime_env_agent_port",
        "dashboard_agent_listen_port",
        "dashboard_port",
    )
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = {name: int(one.getsockname()[1]) for name, one in zip(names, sockets, strict=True)}
    return {"num_cpus": 1, "object_store_memory": 2**27, **ports}


class Nodes:
    """A head that holds the drivers' objects, and a second node that may die."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True, head_node_args={"include_dashboard": False, **node_settings()}
        )
        self.second: Any = None
        self.fix()

    def fix(self) -> None:
        """A second node that lives."""
        if self.alive():
            return
        if self.second is not None:
            self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(**node_settings())

    def alive(self) -> bool:
        """Whether the second node's raylet runs."""
        return self.second is not None and self.raylet().poll() is None

    def raylet(self) -> Any:
        return self.second.all_processes["raylet"][0].process

    def kill(self) -> None:
        """SIGKILL of the second node's raylet; its workers end with it."""
        self.raylet().kill()
        self.raylet().wait()


def start(stage: str, recipe_file: str, address: str) -> subprocess.Popen[bytes]:
    """The stage as the command line runs it, on the cluster at `address`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment |= PATIENT | NO_UPLOAD | {"RAY_ADDRESS": address}
    command = [sys.executable, "-m", "smalti", stage, recipe_file]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(running: subprocess.Popen[bytes]) -> None:
    """Wait for a driver.

    Errors: RuntimeError with the end of what it said, when it failed or hangs.
    """
    try:
        said = running.communicate(timeout=LIMIT_S)[1]
    except subprocess.TimeoutExpired as error:
        running.kill()
        said = running.communicate()[1]
        raise RuntimeError(f"hangs: {said.decode(errors='replace')[-2000:]}") from error
    if running.returncode:
        raise RuntimeError(said.decode(errors="replace")[-3000:])


def worker_pids() -> list[int]:
    """Ray actors that work on shards, below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return sorted(found)


def num_files(artifact: Path) -> int:
    """Shards, and indexes of a corpus that is being made."""
    found = 0
    for folder in ("train", "val", "index/train"):
        with suppress(FileNotFoundError):
            found += sum(name.endswith(".parquet") for name in os.listdir(artifact / folder))
    return found


@dataclass
class Strikes:
    """What is done to one run of a stage: (share of its files, seconds later, kind), and what came
    of each.
    """

    stage: str
    nodes: Nodes
    rng: random.Random
    total: int  # files that the unbroken run made on the way
    lines: list[str] = field(default_factory=list)
    hits: Counter[str] = field(default_factory=Counter)

    def run(self, recipe_file: str, artifact: Path) -> None:
        """The stage, struck by each kind once, to its end.

        Errors: RuntimeError when it fails or hangs.
        """
        shares = sorted(self.rng.random() for _ in KINDS)
        running = start(self.stage, recipe_file, self.nodes.cluster.address)
        for share, kind in zip(shares, self.rng.sample(KINDS, len(KINDS)), strict=True):
            if not self.reached(share, kind, running, artifact):
                self.lines.append(f"{kind} not struck, the stage had ended")
                continue
            time.sleep(self.rng.uniform(0, DELAY_S))
            struck = self.strike(kind, running)
            self.hits[kind] += struck and not (artifact / RECORD).exists()
            self.lines.append(f"{kind} at {share:.2f}" + ("" if struck else " (none alive)"))
            if kind == "driver":
                running.communicate()
                running = start(self.stage, recipe_file, self.nodes.cluster.address)
        finish(running)

    def reached(
        self, share: float, kind: str, running: subprocess.Popen[bytes], artifact: Path
    ) -> bool:
        """Wait until this share of the files exists, and there is an actor if one is to die; False
        when the driver ends.
        """
        deadline = time.monotonic() + LIMIT_S
        while running.poll() is None and time.monotonic() < deadline:
            if num_files(artifact) >= max(1, share * self.total) and (
                kind != "actor" or worker_pids()
            ):
                return True
            time.sleep(0.01)
        return False

    def strike(self, kind: str, running: subprocess.Popen[bytes]) -> bool:
        """SIGKILL; False when there is nothing to kill."""
        if kind == "driver":
            running.kill()
        elif kind == "raylet":
            self.nodes.kill()
            if self.rng.random() < 0.5:
                self.nodes.fix()
                self.lines.append("(replaced)")
        else:
            pids = worker_pids()
            if not pids:
                return False
            with suppress(ProcessLookupError):
                os.kill(self.rng.choice(pids), signal.SIGKILL)
        return True


@dataclass
class Sums:
    """What came of all rounds."""

    equal: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    failed: int = 0

    def add(self, name: str, strikes: Strikes, out: Path, wanted: str) -> None:
        """One struck run that ended, in `out`; printed as a line."""
        same = digest(out / strikes.stage) == wanted
        scores = json.loads((out / strikes.stage / RECORD).read_text())["scores"]
        again = {
            key.partition("/")[2]: value
            for key, value in scores.items()
            if key.startswith("retried/") and value
        }
        print(
            f"{name}: {'equal' if same else 'DIFFERENT'} after {', '.join(strikes.lines)}; {again}",
            flush=True,
        )
        self.runs += 1
        self.equal[strikes.stage] += same
        self.hits.update(strikes.hits)
        self.retried.update(again)

    def fail(self, name: str, strikes: Strikes, error: RuntimeError) -> None:
        """One struck run that did not end well."""
        self.runs += 1
        self.failed += 1
        print(f"{name}: FAILED after {', '.join(strikes.lines)}: {error}", flush=True)

    def result(self) -> dict[str, Any]:
        quality = sum(self.equal.values()) / max(1, self.runs)
        return {
            "what": "restarts",
            "runs": self.runs,
            "quality": quality,
            "equal": dict(self.equal),
            "failed": self.failed,
            "killed_at_work": dict(self.hits),
            "retried": dict(self.retried),
            "met": quality == 1,
            "machine": machine(),
        }


def strike_all(folder: str, runs: int, seed: int) -> Sums:
    """The unbroken run, then `runs` struck ones; what came of those until Ctrl-C."""
    rng, sums = random.Random(seed), Sums()
    whole, nodes = recipe(folder, f"{folder}/whole"), Nodes()
    try:
        for stage in ("corpus", "encoder", "features", "tokens"):
            finish(start(stage, whole, nodes.cluster.address))
        wanted = {stage: digest(Path(folder, "whole", stage)) for stage in STAGES}
        for number in range(runs):
            stage = STAGES[number % len(STAGES)]
            out = Path(folder, f"{seed}-{number}-{stage}")
            out.mkdir()
            for name in {"corpus", "encoder", "tokenizer"} - {stage}:
                Path(out, name).symlink_to(Path(folder, "whole", name))
            nodes.fix()
            groups = IMAGES // SHARD if stage == "corpus" else 0
            strikes = Strikes(stage, nodes, rng, num_files(Path(folder, "whole", stage)) + groups)
            try:
                strikes.run(recipe(folder, str(out)), out / stage)
                sums.add(f"{number} {stage}", strikes, out, wanted[stage])
            except RuntimeError as error:
                sums.fail(f"{number} {stage}", strikes, error)
                nodes.cluster.shutdown()
                nodes = Nodes()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        nodes.cluster.shutdown()
    return sums


def main() -> None:
    os.environ |= PATIENT | {"PYTHONPATH": str(ROOT)}
    # a shell's background job begins without
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=int, nargs="?", default=30)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("folder", nargs="?")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = given.folder or stack.enter_context(tempfile.TemporaryDirectory())
        if not Path(folder, "encoder").exists():
            print(save_encoder(f"{folder}/encoder", PIXELS, 8, 96, 3))
        save_tokenizer(f"{folder}/whole", f"{folder}/encoder", PIXELS)
        sums = strike_all(folder, given.runs, given.seed)
    print(json.dumps({**sums.result(), "seed": given.seed}))


if __name__ == "__main__":
    main()
