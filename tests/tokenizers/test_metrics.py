"""Measures against their definitions and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from smalti.tokenizers.metrics import (
    code_counts,
    dct,
    entropy,
    imbalance,
    perplexity,
    psnr,
    ssim,
    usage,
    vrr,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_psnr_of_a_planted_error() -> None:
    a = torch.zeros(3, 3, 16, 16)
    b = a + torch.tensor([0.1, 0.2, 0.0])[:, None, None, None]
    expected = [10 * math.log10(4 / 0.01), 10 * math.log10(4 / 0.04), math.inf]
    torch.testing.assert_close(psnr(a, b), torch.tensor(expected, dtype=torch.float64))


def test_psnr_and_ssim_equal_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    a = torch.rand(3, 3, 24, 31, generator=seeded(0)) * 2 - 1
    b = (a + torch.randn(3, 3, 24, 31, generator=seeded(1)) * 0.3).clamp(-1, 1)
    for index in range(3):
        x, y = (
            a[index].permute(1, 2, 0).double().numpy(),
            b[index].permute(1, 2, 0).double().numpy(),
        )
        similarity = skimage.structural_similarity(
            x,
            y,
            data_range=2,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(ssim(a, b)[index]) == pytest.approx(similarity, abs=1e-9)
        assert float(psnr(a, b)[index]) == pytest.approx(
            skimage.peak_signal_noise_ratio(x, y, data_range=2), abs=1e-9
        )


def test_ssim_of_equal_images_is_one_and_small_images_are_refused() -> None:
    a = torch.rand(2, 3, 11, 11)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(a[..., :10], a[..., :10])
    with pytest.raises(ValueError, match="equal"):
        psnr(a, a[:1])


def test_counts_usage_entropy_perplexity() -> None:
    counts = code_counts(torch.tensor([[0, 0, 1], [1, 3, 3]]), 8)
    assert counts.tolist() == [2, 2, 0, 2, 0, 0, 0, 0]
    assert usage(counts) == 3 / 8
    assert entropy(counts) == pytest.approx(math.log(3))
    assert perplexity(counts) == pytest.approx(3)
    with pytest.raises(ValueError, match=r"expected \[0, 8\)"):
        code_counts(torch.tensor([8]), 8)
    with pytest.raises(ValueError, match="0 tokens"):
        entropy(torch.zeros(4))


def test_dct_equals_scipy_and_keeps_the_energy() -> None:
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(4, 3, 8, 6, generator=seeded(0))
    np.testing.assert_allclose(
        dct(x).numpy(), fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho"), atol=1e-12
    )
    torch.testing.assert_close(dct(x).square().sum(), x.double().square().sum())


def reference_vrr(patches: torch.Tensor, ids: torch.Tensor) -> float:
    fft = pytest.importorskip("scipy.fft")
    x = fft.dctn(patches.double().numpy(), axes=(-2, -1), norm="ortho").reshape(len(patches), -1)
    inside = [
        x[ids.numpy() == k].var(0, ddof=1).sum()
        for k in ids.unique().tolist()
        if int((ids == k).sum()) >= 2
    ]
    return 1 - float(np.mean(inside)) / x.var(0, ddof=1).sum()


def test_vrr_equals_its_definition_and_skips_lonely_codes() -> None:
    patches, ids = (
        torch.randn(60, 3, 4, 4, generator=seeded(0)),
        torch.randint(0, 12, (60,), generator=seeded(1)),
    )
    ids[0] = 99
    patches += ids[:, None, None, None] * 0.2
    assert vrr(patches, ids, seeded(0))[0] == pytest.approx(reference_vrr(patches, ids), abs=1e-10)


def test_vrr_is_one_for_perfect_codes_and_zero_on_average_for_shuffled_ones() -> None:
    base = torch.randn(10, 1, 4, 4, generator=seeded(0))
    ids = torch.arange(10).repeat_interleave(torch.arange(2, 12))
    perfect, _ = vrr(base[ids], ids, seeded(0))
    assert perfect == pytest.approx(1)
    noise = torch.randn(len(ids), 1, 4, 4, generator=seeded(1))
    shuffles = [vrr(noise, ids, seeded(seed))[1] for seed in range(200)]
    assert abs(float(np.mean(shuffles))) < 0.01, "unbiased: many small codes are not rewarded"


def test_vrr_needs_codes_that_repeat() -> None:
    with pytest.raises(ValueError, match="at least twice"):
        vrr(torch.randn(4, 1, 2, 2), torch.arange(4))
    with pytest.raises(ValueError, match="all equal"):
        vrr(torch.ones(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64))


def test_imbalance_of_even_and_single_codes() -> None:
    assert imbalance(torch.tensor([3, 3, 3, 3])) == pytest.approx(1)
    assert imbalance(torch.tensor([0, 9, 0, 0])) == pytest.approx(4)
    assert imbalance(torch.tensor([3, 1])) == pytest.approx(2 * (9 + 1) / 16)
    with pytest.raises(ValueError, match="0 tokens"):
        imbalance(torch.tensor([0, 0]))
