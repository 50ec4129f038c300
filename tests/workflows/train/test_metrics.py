"""Means of logged numbers, over steps and over a checkpoint between two logs."""

from __future__ import annotations

import json

import torch

from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.metrics import MetricMeans


def test_meter_weighs_by_counts_and_leaves_out_what_counted_nothing() -> None:
    meter = MetricMeans(torch.device("cpu"))
    meter.add(
        {
            "a": 1.0,
            "b": (torch.tensor(2.0), torch.tensor(3.0)),
            "c": (torch.tensor(9.0), torch.tensor(0.0)),
        }
    )
    meter.add(
        {
            "a": 3.0,
            "b": (torch.tensor(6.0), torch.tensor(1.0)),
            "c": (torch.tensor(9.0), torch.tensor(0.0)),
        }
    )
    assert meter.take(Collectives()) == {"a": 2.0, "b": 3.0}
    assert meter.take(Collectives()) == {}


def test_meter_goes_on_between_two_logs() -> None:
    alone = Collectives()
    whole, first, second = (MetricMeans(torch.device("cpu")) for _ in range(3))
    for value in (1.0, 5.0, 6.0):
        whole.add({"a": value, "b": (torch.tensor(value), torch.tensor(value))})
    first.add({"a": 1.0, "b": (torch.tensor(1.0), torch.tensor(1.0))})
    kept = json.loads(json.dumps(first.totals(alone)))
    second.restore(kept, 0)
    other = MetricMeans(torch.device("cpu"))
    other.restore(kept, 1)
    assert other.totals(alone) == {"a": [0.0, 0.0], "b": [0.0, 0.0]}
    for value in (5.0, 6.0):
        second.add({"a": value, "b": (torch.tensor(value), torch.tensor(value))})
    assert second.take(alone) == whole.take(alone) == {"a": 4.0, "b": 62 / 12}
    assert first.take(alone) == {"a": 1.0, "b": 1.0}, "a checkpoint takes nothing away"


def test_every_step_weighs_the_same_in_a_mean_whatever_the_number_of_parts() -> None:
    """A step of four micro batches, then one of two; what is counted weighs by its count alone."""
    meter = MetricMeans(torch.device("cpu"))
    for value in (1.0, 2.0, 3.0, 6.0):
        meter.add({"a": value, "b": (torch.tensor(value), torch.tensor(1.0))}, parts=4)
    for value in (7.0, 11.0):
        meter.add({"a": value, "b": (torch.tensor(value), torch.tensor(2.0))}, parts=2)
    assert meter.take(Collectives()) == {"a": 6.0, "b": 6.0}
