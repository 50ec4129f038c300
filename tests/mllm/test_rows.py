"""Rows made range by range are the rows made at once."""

from __future__ import annotations

import pytest
import torch

from smalti.mllm.rows import WholeRows, grow, ranges, root_mean_square


def grown(step: int | None) -> torch.Tensor:
    old_VH = 3 + 2 * torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    old, new = WholeRows(old_VH), WholeRows(torch.zeros(1000, 24))
    old.step = new.step = step
    grow(old, new, 40, 1000, 24, torch.Generator().manual_seed(2))
    return new.matrix_VH


def test_old_rows_stay_and_new_ones_have_their_mean_and_deviation() -> None:
    rows_VH, old_VH = (
        grown(None),
        3 + 2 * torch.randn(50, 24, generator=torch.Generator().manual_seed(1)),
    )
    assert torch.equal(rows_VH[:40], old_VH[:40])
    new_VH = rows_VH[40:]
    assert float((new_VH.mean(0) - old_VH[:40].mean(0)).abs().max()) < 0.3
    assert float((new_VH - new_VH.mean(0)).std()) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("step", [2, 16, 100, 5000])
def test_ranges_give_the_same_rows(step: int) -> None:
    torch.testing.assert_close(grown(step), grown(None), rtol=1e-5, atol=1e-5)


def test_root_mean_square_and_ranges() -> None:
    rows = WholeRows(torch.arange(12.0).view(6, 2))
    expected = torch.arange(8.0).pow(2).mean().sqrt()
    for step in (None, 1, 3):
        rows.step = step
        torch.testing.assert_close(root_mean_square(rows, 4), expected)
    assert list(ranges(3, 8, 2)) == [(3, 5), (5, 7), (7, 8)]
    assert list(ranges(3, 8, None)) == [(3, 8)] and list(ranges(3, 3, None)) == []
