"""The cache that is laid out once, and linear layers for a few rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from smalti.mllm.cache import as_columns, few_row_linears, make_cache


def test_a_reserved_cache_holds_what_a_growing_one_does(tiny) -> None:
    config = tiny.model.lm.config
    reserved, growing = make_cache(config, 9, static=False), DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    for length in (4, 1, 1):
        keys, values = (torch.randn(2, 2, length, 8, generator=generator) for _ in range(2))
        for layer in range(2):
            held = reserved.update(keys, values, layer)
            expected = growing.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
    assert reserved.get_seq_length() == 6


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_few_rows_as_columns_are_the_same_numbers(rows: int) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 7, bias=False))
    x = torch.randn(rows, 1, 6)
    expected = model(x)
    layers = few_row_linears(model, rows)
    assert len(layers) == 2
    with as_columns(layers):
        assert all("forward" in vars(layer) for layer in layers)
        torch.testing.assert_close(model(x), expected)
    assert all("forward" not in vars(layer) for layer in layers)
    assert (
        few_row_linears(model, 1)
        == few_row_linears(model, 8)
        == few_row_linears(model.bfloat16(), rows)
        == []
    )
