"""Residual quantization: against a reference written out, half batches, usage, the start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smalti.tokenizers.quantizers import VQ, EMAStats
from smalti.tokenizers.residual import ResidualQuantizer

K, D, DEPTH = 12, 5, 3


def quantizer(**settings: float) -> ResidualQuantizer:
    torch.manual_seed(1)
    return ResidualQuantizer(VQ(K, D, **{"beta": 0.5, **settings}), DEPTH)


def by_hand(z_MD: Tensor, codes_KD: Tensor) -> tuple[list[list[int]], Tensor, Tensor, Tensor]:
    """Codes, ẑ, the sum over vectors and depths of ‖z − ẑ_d‖², and the residuals, one vector at a
    time.
    """
    ids, sums, error, residuals = [], [], torch.zeros(()), []
    for z_D in z_MD:
        rest, total, own = z_D, torch.zeros(D), []
        for _ in range(DEPTH):
            residuals.append(rest)
            own.append(min(range(K), key=lambda k: float((rest - codes_KD[k]).square().sum())))
            rest, total = rest - codes_KD[own[-1]], total + codes_KD[own[-1]]
            error = error + (z_D - total).square().sum()
        ids.append(own)
        sums.append(total)
    return ids, torch.stack(sums), error, torch.stack(residuals)


def test_codes_sums_loss_gradient_and_statistics_are_the_reference() -> None:
    rq, z = quantizer(), torch.randn(2, 7, D, requires_grad=True)
    found = rq(z)
    ids, sums, error, residuals = by_hand(z.detach().reshape(-1, D), rq.codes)
    assert found.ids.shape == (2, 7, DEPTH) and found.ids.reshape(-1, DEPTH).tolist() == ids
    assert torch.equal(rq.assign(z), found.ids)
    torch.testing.assert_close(found.q.reshape(-1, D), sums)
    torch.testing.assert_close(rq.embed(found.ids).reshape(-1, D), sums)
    torch.testing.assert_close(found.loss, 0.5 * error / (14 * D * DEPTH))
    (through,) = torch.autograd.grad(found.q.sum(), z, retain_graph=True)
    assert torch.equal(through, torch.ones_like(z)), "straight through"
    (committing,) = torch.autograd.grad(found.loss, z)
    torch.testing.assert_close(
        committing[0, 0],
        sum(z[0, 0] - rq.codes[ids[0][: d + 1]].sum(0) for d in range(DEPTH)) / (14 * D * DEPTH),
    )
    flat = torch.tensor(ids).flatten()
    assert torch.equal(found.stats.counts, torch.bincount(flat, minlength=K).float())
    for k in range(K):
        torch.testing.assert_close(found.stats.sums[k], residuals[flat == k].sum(0))


def test_two_half_batches_make_the_update_of_one() -> None:
    """Counts and sums of all depths go into one update; candidates are the residuals in the order
    of the vectors.
    """
    whole, halves = quantizer(restart_below=8.0), quantizer(restart_below=8.0)
    z = torch.randn(8, 4, D)
    restarted = whole.update(whole(z).stats)
    stats = EMAStats.merge([halves(part).stats for part in z.chunk(2)])
    assert halves.update(stats) == restarted > 0
    torch.testing.assert_close(whole.codes, halves.codes)


def test_a_dead_code_restarts_as_a_residual_of_the_batch() -> None:
    rq, z = quantizer(restart_below=1e9), torch.randn(6, 4, D)
    found = rq(z)
    residuals = by_hand(z.reshape(-1, D), rq.codes.clone())[3]
    assert rq.update(found.stats) == K
    distance = (rq.codes[:, None] - residuals).norm(dim=-1).min(1).values
    torch.testing.assert_close(distance, torch.zeros(K), atol=2e-4, rtol=0)


def test_a_codebook_that_starts_from_vectors_is_used_and_every_depth_comes_closer() -> None:
    generator = torch.Generator().manual_seed(0)
    z = (
        torch.randn(600, D, generator=generator)
        @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2]))
        + 3
    )
    rq = ResidualQuantizer(VQ(48, D), DEPTH)
    rq.init_from(z, generator)
    ids = rq.assign(z)
    assert len(ids.unique()) == 48
    errors = [float((z - rq.embed(ids[:, :d])).square().mean()) for d in range(1, DEPTH + 1)]
    assert errors[0] < float(z.var(0).mean()) / 4
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 1.5
    with pytest.raises(ValueError, match="NaN or Inf"):
        rq.init_from(torch.full((9, D), torch.nan))


def test_arithmetic_is_float32_under_autocast_and_codes_never_leave_it() -> None:
    rq, z = quantizer().bfloat16(), torch.randn(4, D)
    plain = rq(z)
    with torch.autocast("cpu", torch.bfloat16):
        low = rq(z)
    assert rq.codes.dtype == torch.float32 and low.loss.dtype == torch.float32
    assert torch.equal(plain.ids, low.ids) and torch.equal(plain.q, low.q)
