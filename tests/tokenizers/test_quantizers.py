"""Quantizers against plain loops, over ranks, and at their edges."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from smalti.schema import SemanticStage
from smalti.tokenizers.quantizers import (
    QUANTIZERS,
    VQ,
    EMAQuantizer,
    EMAStats,
    NormQuantizer,
    Quantized,
    Quantizer,
    VanillaQuantizer,
)
from smalti.tokenizers.semantic import SemanticTokenizer


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_ema(
    codes: Tensor, batches: list[tuple[Tensor, Tensor]], config: VQ
) -> tuple[Tensor, list[float], list[list[float]]]:
    """The update as a plain loop over codes and vectors, without restarts, in Python floats."""
    counts = [max(1.0, len(batches[0][0]) / config.num_codes)] * config.num_codes
    sums = [[c * counts[k] for c in codes[k].tolist()] for k in range(config.num_codes)]
    for h_MD, ids_M in batches:
        for k in range(config.num_codes):
            mine = [h.tolist() for h, i in zip(h_MD, ids_M, strict=True) if int(i) == k]
            counts[k] = config.decay * counts[k] + (1 - config.decay) * len(mine)
            for d in range(config.dim):
                sums[k][d] = config.decay * sums[k][d] + (1 - config.decay) * sum(
                    h[d] for h in mine
                )
    total = sum(counts)
    smooth = [total * (n + config.eps) / (total + config.num_codes * config.eps) for n in counts]
    return (
        torch.tensor([[s / n for s in row] for row, n in zip(sums, smooth, strict=True)]),
        counts,
        sums,
    )


def test_ema_update_equals_a_plain_loop() -> None:
    config = VQ(num_codes=7, dim=3, decay=0.9, eps=1e-2, restart_below=0.0)
    quantizer = EMAQuantizer(config)
    quantizer.set_codes(torch.randn(7, 3, generator=seeded(0)))
    start = quantizer.codes.clone()
    batches = []
    for step in range(4):
        h_BND = torch.randn(2, 20, 3, generator=seeded(10 + step))
        out = quantizer(h_BND)
        batches.append((h_BND.view(-1, 3), out.ids.flatten()))
        assert quantizer.update(out.stats) == 0
    codes, counts, sums = reference_ema(start, batches, config)
    torch.testing.assert_close(quantizer.codes, codes)
    torch.testing.assert_close(quantizer.counts, torch.tensor(counts))
    torch.testing.assert_close(quantizer.sums, torch.tensor(sums))


def test_restart_takes_a_vector_of_the_batch_and_resets_the_state() -> None:
    config = VQ(num_codes=3, dim=2, decay=0.5, restart_below=1.0)
    quantizer = EMAQuantizer(config)
    quantizer.set_codes(torch.tensor([[0.0, 0.0], [5.0, 5.0], [90.0, 90.0]]))
    h_BND = (
        torch.cat([torch.zeros(1, 8, 2), torch.full((1, 8, 2), 5.0)])
        + torch.randn(2, 8, 2, generator=seeded(1)) * 0.1
    )
    restarted, last_sum = [], torch.empty(0)
    for _ in range(5):
        stats = quantizer(h_BND).stats
        restarted.append(quantizer.update(stats))
        if restarted[-1]:
            last_sum = quantizer.sums[2].clone()
            assert quantizer.counts[2] == 1.0
            break
    assert restarted[-1] == 1, (
        "the code that nothing is near to must restart once its count falls below 1"
    )
    assert any(torch.equal(last_sum, h) for h in h_BND.view(-1, 2)), (
        "M is a vector of the batch, not a mean"
    )
    torch.testing.assert_close(quantizer.codes[2], last_sum, rtol=1e-4, atol=1e-4)
    quantizer.update(quantizer(h_BND).stats)
    assert quantizer.codes[2].norm() < 10, "a revived code is not dragged back to where it died"


def test_a_first_batch_does_not_restart_initialised_codes() -> None:
    quantizer = EMAQuantizer(VQ(num_codes=4, dim=2))
    codes = torch.tensor([[0.0, 0.0], [5.0, 5.0], [9.0, 9.0], [90.0, 90.0]])
    quantizer.set_codes(codes)
    assert quantizer.update(quantizer(torch.zeros(1, 64, 2)).stats) == 0
    torch.testing.assert_close(quantizer.codes[3], codes[3], rtol=1e-3, atol=1e-3)


def simulated_ranks(
    quantizers_R: list[EMAQuantizer], stats_R: list[EMAStats], ranks: list[int] | None = None
) -> list[int]:
    """Run `update` on several ranks whose all_reduce really sums: each rank in a thread, meeting at
    every collective.
    """
    import threading

    size = len(quantizers_R)
    barrier, slots = threading.Barrier(size), [torch.empty(0)] * size
    results: list[int | BaseException] = [0] * size

    def reducer(rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait(20)
            total = torch.stack(list(slots)).sum(0)
            barrier.wait(20)
            return total

        return all_reduce

    def work(rank: int) -> None:
        try:
            shown = ranks[rank] if ranks else rank
            results[rank] = quantizers_R[rank].update(stats_R[rank], reducer(rank), rank=shown)
        except BaseException as error:  # handed to the test's own thread below
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, ValueError):
            raise result
    assert all(isinstance(result, int) for result in results), results
    return [int(result) for result in results]  # type: ignore[arg-type]


def test_two_half_batches_on_two_ranks_equal_one_batch_on_one_with_restarts() -> None:
    config = VQ(num_codes=16, dim=3, decay=0.5, restart_below=1.0)
    single, left, right = EMAQuantizer(config), EMAQuantizer(config), EMAQuantizer(config)
    for quantizer in (single, left, right):
        quantizer.set_codes(torch.randn(16, 3, generator=seeded(5)) * 4)
    total = 0
    for step in range(6):
        h_BND = torch.randn(4, 9, 3, generator=seeded(20 + step))
        total += single.update(single(h_BND).stats)
        moved = simulated_ranks([left, right], [left(h_BND[:2]).stats, right(h_BND[2:]).stats])
        assert moved[0] == moved[1]
        assert torch.equal(left.codes, right.codes)
        torch.testing.assert_close(left.codes, single.codes)
    assert total > 0, "the case must exercise restarts"


def test_ranks_that_share_a_number_are_told() -> None:
    config = VQ(num_codes=8, dim=2, restart_below=100.0)
    pair = [EMAQuantizer(config), EMAQuantizer(config)]
    for quantizer in pair:
        quantizer.set_codes(torch.randn(8, 2, generator=seeded(5)) * 9)
    h_BND = torch.zeros(1, 30, 2)
    stats = [quantizer(h_BND).stats for quantizer in pair]
    with pytest.raises(ValueError, match="same rank"):
        simulated_ranks(pair, stats, ranks=[0, 0])


def test_merged_micro_batches_equal_one_batch() -> None:
    h_MD, ids_M = (
        torch.randn(30, 4, generator=seeded(0)),
        torch.randint(0, 5, (30,), generator=seeded(1)),
    )
    whole = EMAStats.of(h_MD, ids_M, 5)
    merged = EMAStats.merge(
        [EMAStats.of(h_MD[:11], ids_M[:11], 5), EMAStats.of(h_MD[11:], ids_M[11:], 5)]
    )
    assert torch.equal(whole.counts, merged.counts)
    assert torch.equal(whole.candidates, merged.candidates)
    torch.testing.assert_close(whole.sums, merged.sums)


def test_ema_statistics_equal_the_one_hot_product() -> None:
    h_MD, ids_M = (
        torch.randn(200, 4, generator=seeded(0)),
        torch.randint(0, 9, (200,), generator=seeded(1)),
    )
    one_hot = torch.nn.functional.one_hot(ids_M, 9).float()
    stats = EMAStats.of(h_MD, ids_M, 9)
    torch.testing.assert_close(stats.sums, one_hot.T @ h_MD)
    assert torch.equal(stats.counts, one_hot.sum(0))


def test_ema_state_stays_float32_in_a_bf16_module_and_is_saved() -> None:
    quantizer = EMAQuantizer(VQ(5, 2)).to(torch.bfloat16)
    assert {quantizer.codes.dtype, quantizer.counts.dtype, quantizer.sums.dtype} == {torch.float32}
    out = quantizer(torch.randn(1, 6, 2, dtype=torch.bfloat16))
    assert out.q.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert out.stats.sums.dtype == torch.float32
    quantizer.update(out.stats)
    buffer = io.BytesIO()
    torch.save(quantizer.state_dict(), buffer)
    buffer.seek(0)
    again = EMAQuantizer(VQ(5, 2))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for name in ("codes", "counts", "sums", "num_updates"):
        assert torch.equal(getattr(again, name), getattr(quantizer, name))


def test_ema_refuses_vectors_that_diverged() -> None:
    quantizer = EMAQuantizer(VQ(4, 2))
    before = quantizer.codes.clone()
    with pytest.raises(FloatingPointError, match="NaN"):
        quantizer.update(
            EMAStats.of(torch.full((3, 2), float("nan")), torch.zeros(3, dtype=torch.int64), 4)
        )
    assert torch.equal(before, quantizer.codes)


def test_eval_collects_no_statistics() -> None:
    assert EMAQuantizer(VQ(4, 2)).eval()(torch.randn(1, 3, 2)).stats is None


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_straight_through_passes_the_gradient_of_q_to_h(kind: str) -> None:
    quantizer = QUANTIZERS[kind](VQ(6, 4, beta=0.0))
    h_BND = torch.randn(2, 5, 4, requires_grad=True)
    out = quantizer(h_BND)
    torch.testing.assert_close(out.q, quantizer.effective_codes()[out.ids])
    weight = torch.randn(2, 5, 4)
    (out.q * weight).sum().backward()
    if kind != "norm":
        torch.testing.assert_close(h_BND.grad, weight)
    assert h_BND.grad.abs().sum() > 0


def test_vanilla_losses_train_codes_and_vectors_as_written() -> None:
    quantizer = VanillaQuantizer(VQ(6, 4, beta=0.25))
    h_BND = torch.randn(2, 5, 4, requires_grad=True)
    out = quantizer(h_BND)
    q = quantizer.codes.detach()[out.ids]
    torch.testing.assert_close(out.loss, 1.25 * (h_BND.detach() - q).square().mean())
    out.loss.backward()
    torch.testing.assert_close(h_BND.grad, 0.25 * 2 * (h_BND.detach() - q) / h_BND.numel())
    expected = torch.zeros(6, 4).index_add_(
        0, out.ids.flatten(), (2 * (q - h_BND.detach()) / h_BND.numel()).view(-1, 4)
    )
    torch.testing.assert_close(quantizer.codes.grad, expected)


def test_norm_looks_up_by_cosine_and_gives_unit_vectors() -> None:
    quantizer = NormQuantizer(VQ(9, 4))
    h_BND = torch.randn(2, 5, 4) * 7
    out = quantizer(h_BND)
    cosine = torch.nn.functional.cosine_similarity(
        h_BND.unsqueeze(2), quantizer.codes.detach(), dim=-1
    )
    assert torch.equal(out.ids, cosine.argmax(-1))
    torch.testing.assert_close(out.q.norm(dim=-1), torch.ones(2, 5))
    assert torch.equal(quantizer.assign(h_BND), quantizer.assign(h_BND * 3))


def check_contract(make: Callable[[VQ], Quantizer]) -> None:
    """What `Quantizer` promises, on codes that a k-means could have given."""
    config = VQ(num_codes=12, dim=5)
    quantizer = make(config).eval()
    codes_KD = torch.randn(12, 5, generator=seeded(3)) * 2 + 0.5
    quantizer.set_codes(codes_KD)
    effective_KD = quantizer.effective_codes().detach().clone()
    torch.testing.assert_close(effective_KD, quantizer.representable(codes_KD))
    assert effective_KD.shape == (12, 5)
    assert effective_KD.dtype == torch.float32
    assert torch.equal(quantizer.assign(effective_KD), torch.arange(12))
    assert torch.equal(quantizer.assign(codes_KD), torch.arange(12)), (
        "a centroid keeps its own code"
    )

    h_BND = torch.randn(2, 7, 5, generator=seeded(4))
    out = quantizer(h_BND)
    assert torch.equal(out.ids, quantizer.assign(h_BND))
    assert out.ids.dtype == torch.int64
    torch.testing.assert_close(out.q, effective_KD[out.ids])
    assert out.loss.shape == ()
    assert bool(torch.isfinite(out.loss))

    loaded = make(config).eval()
    loaded.load_state_dict(quantizer.state_dict())
    assert torch.equal(loaded.effective_codes(), quantizer.effective_codes())
    stats = EMAStats.of(h_BND.view(-1, 5), out.ids.flatten(), 12)
    assert isinstance(quantizer.update(stats), int)


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_every_quantizer_keeps_the_contract(kind: str) -> None:
    check_contract(QUANTIZERS[kind])


class LinearQuantizer(VanillaQuantizer):
    """As SimVQ (arXiv 2411.02038): frozen codes behind a trained linear map.

    `solve` keeps a start.
    """

    solve = True

    def __init__(self, config: VQ) -> None:
        super().__init__(config)
        self.map = torch.nn.Linear(config.dim, config.dim, bias=False)
        self.codes.requires_grad_(False)

    def set_codes(self, codes_KD: Tensor) -> None:
        super().set_codes(codes_KD)
        if self.solve:
            with torch.no_grad():
                self.codes.copy_(torch.linalg.solve(self.map.weight, codes_KD.T).T)

    def effective_codes(self) -> Tensor:
        return self.map(self.codes)

    def forward(self, h_BND: Tensor) -> Quantized:
        ids = self.assign(h_BND)
        q = self.effective_codes()[ids]
        return Quantized(h_BND + (q - h_BND).detach(), ids, (q - h_BND).square().mean(), None)


class ForgetfulQuantizer(LinearQuantizer):
    solve = False


def test_the_contract_finds_a_quantizer_that_loses_its_start() -> None:
    check_contract(LinearQuantizer)
    with pytest.raises(AssertionError):
        check_contract(ForgetfulQuantizer)


def test_recipes_can_name_every_quantizer_and_no_other() -> None:
    assert set(get_args(SemanticStage.model_fields["vq"].annotation)) == set(QUANTIZERS)


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_a_semantic_codebook_of_every_kind_starts_from_its_centroids(kind: str) -> None:
    centroids_KC = torch.randn(20, 16, generator=seeded(5))
    tokenizer = SemanticTokenizer(
        16, SemanticStage(vq=kind, dim=8, decoder_dim=16, decoder_heads=2), 20, (2, 2)
    )
    tokenizer.init_from(centroids_KC)
    assert torch.equal(tokenizer.encode(centroids_KC), torch.arange(20))


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_set_codes_checks(kind: str) -> None:
    quantizer = QUANTIZERS[kind](VQ(4, 2))
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        quantizer.set_codes(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="NaN"):
        quantizer.set_codes(torch.full((4, 2), float("nan")))
