"""The GPU benchmarks in their tiny CPU mode: they run, print one table, and need little beside
torch and transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smalti.schema import Train

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("gpu_*.py"))
CODE = """
import importlib, sys
for name in ('ray', 'deepspeed', 'mlflow', 'pydantic', 'annotated_types', 'torchvision', 'accelerate', 'peft', 'liger_kernel', 'faiss'):
    sys.modules[name] = None  # as on the machine with the GPU, which has none of them
import torch
torch.set_num_threads(1)
for name in sys.argv[1:]:
    importlib.import_module(f'bench.{name}').main(['--tiny'])
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What all of them print, one after the other in one process."""
    command = [sys.executable, "-c", CODE, *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_each_goal_has_its_script_and_prints_its_table(printed: list[str]) -> None:
    assert SCRIPTS == [
        "gpu_assignment",
        "gpu_cross_entropy",
        "gpu_decoding",
        "gpu_encoder",
        "gpu_training",
    ]
    results = [json.loads(line) for line in printed if line.startswith("{")]
    assert [result["goal"] for result in results] == SCRIPTS
    assert all(result["tiny"] and not result["met"] for result in results)


def test_the_bare_loops_optimizer_is_a_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.gpu_training import ADAMW

    assert vars(ADAMW).items() <= Train().model_dump().items()


def test_decoding_runs_ahead_in_order_and_no_farther_than_its_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.gpu_encoder import in_order

    begun: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(20):
            begun.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        for place, result in enumerate(in_order(pool, lambda number: number**2, tasks(), 3)):
            assert result == place**2
            assert len(begun) <= place + 3
    assert begun == list(range(20))


def test_results_are_kept_in_one_file_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script's newest result takes the place of its last one; the others stay."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu

    out = tmp_path / "results" / "gpu.json"
    asked = gpu.arguments("x", ["--tiny", "--out", str(out)])
    for title, value in (("gpu_b: b", 1.0), ("gpu_a: a", 2.0), ("gpu_b: b", float("nan"))):
        gpu.report(title, [("rate", value, "1/s")], {"rate": (">=", 1.0)}, asked)
    found = json.loads(out.read_text())
    assert [(entry["goal"], entry["measures"]["rate"]) for entry in found] == [
        ("gpu_a", 2.0),
        ("gpu_b", None),
    ]
    assert gpu.arguments("x", ["--tiny"]).out is None


def test_the_quick_ways_give_the_same_result(printed: list[str]) -> None:
    measures = {}
    for line in printed:
        if line.startswith("{"):
            measures |= json.loads(line)["measures"]
    assert measures["same codes in bf16 and fp32"] == 1.0
    assert measures["difference of the losses"] < 1e-5
    assert measures["parameters"] > 0
