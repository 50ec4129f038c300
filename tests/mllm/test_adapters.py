"""What reaches which half, and at which scale."""

from __future__ import annotations

import pytest
import torch

from smalti.errors import ConfigError
from smalti.mllm.adapters import DualAdapter, SingleAdapter


def test_each_part_of_the_code_fills_its_own_half() -> None:
    adapter = DualAdapter((6, 3), 16, 33)
    codes = torch.randn(5, 9)
    other = codes.clone()
    other[:, 6:] += 1
    before, after = adapter(codes), adapter(other)
    assert before.shape == (5, 33)
    assert torch.equal(before[:, :16], after[:, :16])
    assert not torch.isclose(before[:, 16:], after[:, 16:]).all(1).any()


def test_dual_equals_two_separate_networks() -> None:
    adapter = DualAdapter((6, 3), 16, 32)
    codes = torch.randn(5, 9)
    expected = torch.cat([adapter.semantic(codes[:, :6]), adapter.pixel(codes[:, 6:])], -1)
    torch.testing.assert_close(adapter(codes), expected)


def test_output_depends_on_the_code_alone() -> None:
    adapter = SingleAdapter((6, 3), 16, 32)
    codes = torch.randn(5, 9)
    torch.testing.assert_close(adapter(codes)[2:3], adapter(codes[2:3]))


def test_scale_of_the_codebook_does_not_matter_once_fitted() -> None:
    torch.manual_seed(0)
    adapter = DualAdapter((6, 3), 16, 32)
    codes = torch.randn(50, 9)
    adapter.fit(codes)
    expected = adapter(codes)
    scaled = torch.cat([100 * codes[:, :6] + 7, 1e-3 * codes[:, 6:]], -1)
    adapter.fit(scaled)
    torch.testing.assert_close(adapter(scaled), expected, rtol=1e-3, atol=1e-4)


def test_each_part_of_the_codebook_is_whitened() -> None:
    """Planted: strongly correlated channels, tiny ones, a shift; then no direction of a part stands
    out.
    """
    torch.manual_seed(0)
    mix = torch.randn(6, 6) * torch.tensor([1.0, 1.0, 0.5, 0.5, 0.3, 0.3])
    codes = torch.cat([torch.randn(4000, 6) @ mix + 3, 1e-2 * torch.randn(4000, 3)], -1)
    adapter = DualAdapter((6, 3), 16, 32)
    adapter.fit(codes)
    white = (codes - adapter.shift_C) @ adapter.whiten_CC
    for part in white.split((6, 3), -1):
        torch.testing.assert_close(torch.cov(part.T), torch.eye(part.shape[1]), atol=0.05, rtol=0)
    assert not adapter.whiten_CC[:6, 6:].any()


def test_whitening_stays_float32_under_autocast() -> None:
    """Codes far from the origin that differ by little, and in some directions by less."""
    torch.manual_seed(0)
    codes = torch.randn(500, 4) @ torch.randn(4, 4) * 0.02 + 10
    adapter = SingleAdapter((4,), 8, 8)
    adapter.fit(codes)
    seen = []
    adapter.project = lambda white: seen.append(white) or white  # type: ignore[method-assign]
    expected = adapter(codes)
    with torch.autocast("cpu", torch.bfloat16):
        adapter(codes)
    assert torch.equal(seen[1], expected)


def test_a_direction_that_no_code_uses_is_not_blown_up() -> None:
    codes = torch.randn(500, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    adapter = SingleAdapter((4,), 8, 8)
    adapter.fit(codes)
    assert adapter.whiten_CC.abs().max() < 1.01 * (codes.var(0)[:3].max() * 1e-4).rsqrt()


def test_constant_codebook_gives_finite_output() -> None:
    adapter = SingleAdapter((4,), 8, 8)
    adapter.fit(torch.ones(10, 4))
    assert torch.isfinite(adapter(torch.ones(2, 4))).all()


def test_dual_of_one_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter=single"):
        DualAdapter((8,), 16, 32)
