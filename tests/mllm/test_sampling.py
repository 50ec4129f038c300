"""Codes drawn from logits, and the seeds of samples."""

from __future__ import annotations

import torch

from smalti.mllm.sampling import choose, sample_seed
from smalti.schema import Sampling


def test_codes_are_drawn_in_proportion() -> None:
    probabilities = torch.tensor([0.5, 0.1, 0.0, 0.4])
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    logits = probabilities.log().expand(10_000, 4)
    drawn = choose(logits, Sampling(), uniform)
    torch.testing.assert_close(
        drawn.bincount(minlength=4) / 10_000, probabilities, atol=2e-3, rtol=0
    )


def test_top_k_and_top_p_keep_the_best_only() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1000, 4)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    assert set(choose(logits, Sampling(top_k=2), uniform).tolist()) == {0, 1}
    assert set(choose(logits, Sampling(top_p=0.65), uniform).tolist()) == {0, 1}
    assert set(choose(logits, Sampling(top_p=0.75), uniform).tolist()) == {0, 1, 2}
    assert set(choose(logits, Sampling(top_p=0.0), uniform).tolist()) == {0}
    assert set(choose(logits, Sampling(top_k=99), uniform).tolist()) == {0, 1, 2, 3}


def test_the_largest_random_number_never_leaves_the_support() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose(logits, Sampling(), almost_one).item() == 1


def test_seeds_of_samples_differ() -> None:
    seeds = {sample_seed(seed, index) for seed in range(20) for index in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
