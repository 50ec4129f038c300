"""Precision of the frozen encoder."""

from __future__ import annotations

from smalti.schema import (
    Train,
)
from smalti.workflows.train.tasks.images import encodes_in_bf16


def test_the_frozen_encoder_computes_in_bf16_where_training_does_on_a_gpu() -> None:
    low, full = Train(precision="bf16"), Train()
    assert [
        encodes_in_bf16("auto", train, gpu) for train in (low, full) for gpu in (True, False)
    ] == [
        True,
        False,
        False,
        False,
    ]
    assert encodes_in_bf16("bf16", full, False)
    assert not encodes_in_bf16("fp32", low, True)
