"""The training loop on Ray Train: worker counts, ZeRO, resuming, errors.

A run starts in about ten seconds.

Covers: workflows/train/driver_channel.py, workflows/train/job.py, workflows/train/worker.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from smalti.errors import ConfigError, DataError, TrainingError

TOY = Path(__file__).with_name("toy_training.py")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy_training", TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_training"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["toy_training"]


@pytest.fixture(scope="module")
def reference(on_ray, toy, tmp_path_factory) -> Path:
    """One worker, no ZeRO: what the other ways of running must come to."""
    path = tmp_path_factory.mktemp("reference")
    assert toy.train(str(path)) == {"calls": 48.0}
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    engines = torch.load(path / "final.pt", weights_only=True)
    return {f"{engine}.{name}": t for engine, state in engines.items() for name, t in state.items()}


def distance(a: Path, b: Path) -> float:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def history(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_history_and_no_checkpoints(reference) -> None:
    rows = history(reference)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert "critic" not in rows[0] and "critic" in rows[-1]
    assert not (reference / "checkpoints").exists()
    assert weights(reference)["model.mean"].abs().max() > 0


def test_a_finished_run_is_not_run_again(reference, toy, monkeypatch) -> None:
    monkeypatch.setattr(
        "smalti.workflows.train.launch._run", lambda *a: pytest.fail("trained again")
    )
    assert toy.train(str(reference)) == {"calls": 48.0}


WAYS = {
    "zero0": {},
    "zero3": {"zero_stage": 3},
    "accumulation": {"micro_batch_size": 2, "zero_stage": 2},
}


@pytest.fixture(scope="module")
def pair(on_ray, toy, tmp_path_factory) -> tuple[Path, dict[str, dict[str, float]]]:
    """Two workers, in each of `WAYS`: the folder, and the final numbers."""
    path = tmp_path_factory.mktemp("pair")
    return path, toy.train_in_turn(str(path), 2, WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_two_workers_come_to_what_one_does(reference, pair, way) -> None:
    path, numbers = pair
    assert numbers[way]["calls"] == (96.0 if way == "accumulation" else 48.0)
    assert distance(path / way, reference) < 1e-5
    for ours, theirs in zip(history(path / way), history(reference), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_killed_worker_is_restarted_from_the_checkpoint(reference, toy, tmp_path, zero) -> None:
    """Rank 0 dies at step 13, with a checkpoint at 8; the buffers and both engines come back too."""
    flag = tmp_path / "flag"
    flag.touch()
    saved = tmp_path / "run" / "checkpoints" / "step-000000008"
    settings = {
        "die_at": 13,
        "flag": str(flag),
        "record": str(tmp_path / "record"),
        "saved": str(saved),
    }
    toy.train(str(tmp_path / "run"), workers=2 if zero else 1, zero_stage=zero, settings=settings)
    assert not flag.exists()
    again = toy.check_record(settings["record"], 24, 8)
    assert again in ((5, 6) if zero else (5,)), (
        "8 to 12 are taken again, and 13 when the other worker had begun it"
    )
    assert distance(tmp_path / "run", reference) <= (1e-5 if zero else 0)
    for ours, theirs in zip(history(tmp_path / "run"), history(reference), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4 if zero else 0)


def test_a_broken_shard_is_one_clear_error_and_not_tried_over_and_over(
    on_ray, toy, tmp_path
) -> None:
    with pytest.raises(DataError, match="train/00001 is torn"):
        toy.train(str(tmp_path), workers=2, settings={"broken": True}, max_failures=0)


def test_steps_without_a_finite_loss_are_passed_over_and_too_many_end_the_run(
    on_ray, toy, tmp_path
) -> None:
    """From step 8 on one of two workers meets NaN: two steps are skipped by both, the third
    ends the run.
    """
    told = r"loss or the gradient of steps 8 to 10 of 24 is not finite .* train.max_skipped=2 "
    with pytest.raises(TrainingError, match=told):
        toy.train(str(tmp_path), workers=2, settings={"nan_from": 7}, max_skipped=2)
    first, second = history(tmp_path)
    assert (first["skipped_steps"], second["skipped_steps"]) == (0, 1)
    assert first["grad_norm"] > 0 and second["loss"] < first["loss"], "skipped steps are in no mean"
    assert [f.name for f in (tmp_path / "checkpoints").glob("step-*")] == ["step-000000008"]


def test_a_batch_that_workers_cannot_share_fails_before_anything_starts(toy, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size=7 .* resources.workers=2"):
        toy.train(str(tmp_path), workers=2, batch_size=7)


def test_a_killed_driver_goes_on_and_ends_with_the_same_model(
    on_ray, start, as_driver, toy, tmp_path
) -> None:
    """SIGKILL between checkpoints; the same command again. Dropout draws too."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    killed = start([str(TOY), str(broken), "0.4"], as_driver)
    until = time.monotonic() + 120
    while not (broken / "checkpoints" / "step-000000008" / "manifest-00000.json").exists():
        assert killed.poll() is None and time.monotonic() < until, killed.text()
        time.sleep(0.1)
    time.sleep(1.0)
    killed.kill()
    assert not (broken / "final.pt").exists()
    again = start([str(TOY), str(broken), "0.0"], as_driver)
    assert again.wait() == 0, again.text()
    assert "resuming after step" in again.text()
    toy.train(str(whole), settings={"dropout": 0.5})
    assert distance(broken, whole) == 0
    assert history(broken) == history(whole)
