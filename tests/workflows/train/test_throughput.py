"""Rates and FLOPs of a training, computed by hand."""

from __future__ import annotations

import pytest
import torch

from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.throughput import Throughput, flops_a_token


def test_throughput_by_hand(monkeypatch) -> None:
    """Two steps of 8 samples in ten seconds, of which two and a half went by waiting."""
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr("smalti.workflows.train.throughput.time.monotonic", lambda: next(clock))
    meter = Throughput(torch.device("cpu"), 8, 1e8)
    assert meter.peak is None, "a CPU has no peak here, so no MFU"
    meter.peak = 4e9
    meter.step(1.0, [("tokens", 100.0), None])
    meter.step(1.5, [("tokens", 50.0)])
    found = meter.take(Collectives())
    assert 0 < found.pop("memory_gb") < 100
    assert found == pytest.approx(
        {"samples_per_s": 1.6, "data_wait": 0.25, "tokens_per_s": 15.0, "mfu": 0.375}
    )


def test_flops_of_a_token_are_those_of_the_matrices_it_passes() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Embedding(5, 8), torch.nn.Linear(16, 4, bias=False)
    )
    model[2].requires_grad_(False)
    assert flops_a_token(model, without=model[1]) == 6 * 8 * 16 + 4 * 16 * 4
    assert flops_a_token(model, without=model[1], backward=False) == 2 * (8 * 16 + 16 * 4)
    of_samples = Throughput(torch.device("cpu"), 4, flops_per_unit=1e3, peak=1e6)
    of_samples.step(0.0, [None])
    found = of_samples.take(Collectives())
    assert found["mfu"] == pytest.approx(found["samples_per_s"] * 1e3 / 1e6)
