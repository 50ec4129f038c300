"""The search for the nearest code against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.tokenizers import flat_search
from smalti.tokenizers.flat_search import nearest, search


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nearest_finds_the_planted_code() -> None:
    codes_KD = torch.randn(64, 8, generator=seeded(0))
    planted_BN = torch.tensor([[5, 63, 0], [7, 7, 1]])
    assert torch.equal(nearest(codes_KD[planted_BN] + 1e-3, codes_KD), planted_BN)


def test_search_equals_a_plain_loop_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    z_MD, codes_KD = (
        torch.randn(50, 5, generator=seeded(1)),
        torch.randn(37, 5, generator=seeded(2)),
    )
    expected = torch.tensor(
        [min(range(37), key=lambda k: float((z - codes_KD[k]).square().sum())) for z in z_MD]
    )
    monkeypatch.setattr(flat_search, "CODE_BLOCK", 8)
    monkeypatch.setattr(flat_search, "SCRATCH_SCORES", 64)
    ids_M, distance_M = search(z_MD, codes_KD)
    assert torch.equal(ids_M, expected)
    torch.testing.assert_close(
        distance_M, (z_MD - codes_KD[expected]).square().sum(-1), rtol=1e-4, atol=1e-5
    )


def test_ties_take_the_lowest_index_also_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes_KD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    z_MD = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    for block in (2, 3, 100):
        monkeypatch.setattr(flat_search, "CODE_BLOCK", block)
        assert nearest(z_MD, codes_KD).tolist() == [0, 1]


def test_search_is_float32_under_bf16_autocast() -> None:
    codes_KD = torch.tensor([[256.0, 0.0], [257.0, 0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest(torch.tensor([[257.0, 0.0]]), codes_KD).tolist() == [1]


def test_search_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="0 codes"):
        search(torch.randn(2, 3), torch.randn(0, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        search(torch.randn(2, 3), torch.randn(4, 5))


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_search_distance_is_the_least_of_all(num: int, codes: int, dim: int, seed: int) -> None:
    z_MD, codes_KD = (
        torch.randn(num, dim, generator=seeded(seed)),
        torch.randn(codes, dim, generator=seeded(seed + 1)),
    )
    every_MK = (z_MD[:, None] - codes_KD).square().sum(-1)
    ids_M, distance_M = search(z_MD, codes_KD, chunk=3)
    torch.testing.assert_close(distance_M, every_MK.min(-1).values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        every_MK.gather(1, ids_M[:, None])[:, 0], every_MK.min(-1).values, rtol=1e-4, atol=1e-5
    )
