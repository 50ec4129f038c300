"""Traces of small steps, by hand.

Covers: workflows/plan/flops.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smalti.mllm.losses import IGNORE, LossHead
from smalti.tokenizers.vit import Transformer
from smalti.workflows.plan.trace import Autocast, Backward, recomputing, trace

ROWS, WIDTH, CODES = 6, 8, 10


@pytest.mark.parametrize("bf16", [False, True])
def test_flops_and_saved_bytes_of_a_linear_layer(bf16: bool) -> None:
    """Forward, gradient of the input, gradient of the weight: 2·M·N·K each."""
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, False, device="meta") for _ in range(2)))

    def step(backward: Backward, autocast: Autocast) -> None:
        with autocast():
            out = layers(torch.empty(ROWS, WIDTH))
        backward(out.float().sum())

    traced = trace(layers, step, bf16=bf16)
    product = 2 * ROWS * WIDTH * WIDTH
    assert traced.flops["bf16" if bf16 else "fp32"] == 5 * product, "no gradient of the batch"
    copy = 2 * WIDTH * WIDTH if bf16 else 0
    assert traced.saved - traced.bare_saved == copy, "of the layer whose input has a gradient"
    assert traced.peak >= traced.saved >= 4 * ROWS * WIDTH


def test_what_depends_on_the_batch_alone_has_values() -> None:
    """Masks and counts of a batch are read; what weights compute of it has shapes only."""
    layer = nn.Linear(WIDTH, WIDTH, False, device="meta")
    ids = torch.tensor([3, 0, 3, 1, 0, 3])
    found: list[tuple[int, ...]] = []

    def step(backward: Backward, autocast: Autocast) -> None:
        assert int((ids == 3).sum()) == 3
        assert ids.unique().tolist() == [0, 1, 3]
        out = layer(torch.ones(ROWS, WIDTH))
        chosen = out[ids == 3]
        found.append(tuple(chosen.shape))
        placed = torch.zeros(ROWS, WIDTH).masked_scatter((ids == 3)[:, None], chosen)
        backward(placed.sum())

    traced = trace(layer, step, bf16=False)
    assert found == [(3, WIDTH)]
    assert traced.flops["fp32"] == 2 * 2 * ROWS * WIDTH * WIDTH


def test_a_head_loss_counts_flops_and_calls_but_no_memory() -> None:
    """Of the positions with a label: logits, and the gradients of both sides."""
    head = LossHead(WIDTH, CODES, bias=False, device="meta")
    labels = torch.tensor([1, IGNORE, 9, IGNORE, 0, 2])

    def step(backward: Backward, autocast: Autocast) -> None:
        hidden = torch.ones(ROWS, WIDTH, requires_grad=True)
        backward(head(hidden, labels, chunk=2)[0])

    traced = trace(head, step, bf16=False)
    assert traced.flops["fp32"] == 3 * 2 * 4 * CODES * WIDTH
    assert traced.calls > 10
    assert traced.saved < 2 * 4 * ROWS * WIDTH, "the batch, and no gradient of the weight"


def test_recomputed_blocks_run_twice_forward() -> None:
    with torch.device("meta"):
        body = Transformer(WIDTH, 2, 2)

    def step(backward: Backward, autocast: Autocast) -> None:
        backward(body(torch.ones(1, ROWS, WIDTH, requires_grad=True)).sum())

    plain = trace(body, step, bf16=False)
    with recomputing(body):
        again = trace(body, step, bf16=False)
    assert again.flops["fp32"] == pytest.approx(plain.flops["fp32"] * 4 / 3, rel=0.1)
    assert again.saved < plain.saved
