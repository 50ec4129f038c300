"""k-means maths: planted clusters, exact shares, statistics that add up."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.tokenizers import kmeans as module
from smalti.tokenizers.kmeans import (
    allocate,
    assign,
    kmeans,
    lloyd_stats,
    move,
    reseed_empty,
    seed_plusplus,
    seed_random,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(num: int = 6, each: int = 40, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Well-separated blobs in shuffled order, and their centres."""
    centres = torch.randn(num, dim, generator=seeded(1)) * 20
    x = centres.repeat(each, 1) + torch.randn(num * each, dim, generator=seeded(2)) * 0.1
    return x[torch.randperm(len(x), generator=seeded(3))], centres


def test_planted_clusters_are_found() -> None:
    x, centres = planted()
    found = kmeans(x, 6, 10, seeded(0))
    _, distance = assign(centres, found)
    assert float(distance.max()) < 0.05


def test_random_seeding_with_reseeded_empties_also_covers_planted_clusters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PLUSPLUS_MAX", 0)
    x, _ = planted()
    _, distance = assign(x, kmeans(x, 12, 15, seeded(0)))
    assert float(distance.mean()) < 60


def test_lloyd_never_raises_the_distortion() -> None:
    x = torch.randn(500, 4, generator=seeded(0))
    centroids, last = seed_random(x, 20, seeded(1)), float("inf")
    for _ in range(8):
        ids, distance = assign(x, centroids)
        assert float(distance.mean()) <= last + 1e-6
        last = float(distance.mean())
        centroids = move(centroids, *lloyd_stats(x, ids, 20))


def test_statistics_of_parts_add_up_to_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUM_NUMBERS", 7 * 3)
    x, ids = (
        torch.randn(101, 3, generator=seeded(0)),
        torch.randint(0, 8, (101,), generator=seeded(1)),
    )
    sums, counts = lloyd_stats(x, ids, 8)
    assert sums.dtype == torch.float64
    assert counts.dtype == torch.int64
    loop = torch.zeros(8, 3, dtype=torch.float64)
    for row, k in zip(x, ids, strict=True):
        loop[k] += row.double()
    assert torch.equal(sums, loop)
    left, right = lloyd_stats(x[:40], ids[:40], 8), lloyd_stats(x[40:], ids[40:], 8)
    torch.testing.assert_close(left[0] + right[0], sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(left[1] + right[1], counts)


def test_empty_centroids_move_to_the_farthest_distinct_vectors() -> None:
    x = torch.tensor([[0.0], [0.1], [50.0], [50.0], [-70.0]])
    centroids = torch.tensor([[0.0], [999.0], [999.0]])
    ids, distance = assign(x, centroids)
    moved, num = reseed_empty(centroids, torch.bincount(ids, minlength=3), x, distance)
    assert num == 2
    assert sorted(moved.flatten().tolist()) == [-70.0, 0.0, 50.0]
    assert torch.equal(centroids[1:], torch.full((2, 1), 999.0)), "the argument is not written to"


def test_more_clusters_than_distinct_vectors_stays_finite() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(10, 1)
    found = kmeans(x, 5, 4, seeded(0))
    assert found.shape == (5, 2)
    assert bool(torch.isfinite(found).all())
    assert float(assign(x, found)[1].max()) < 1e-6


def test_seeds_are_distinct_when_they_can_be() -> None:
    x = torch.cat([torch.zeros(200, 1), torch.arange(1, 10).float()[:, None]])
    for seed in range(5):
        assert len(seed_random(x, 10, seeded(seed)).unique()) == 10
        assert len(seed_plusplus(x, 10, seeded(seed)).unique()) == 10
    assert len(seed_random(x[:3], 7, seeded(0))) == 7


def test_plusplus_reaches_a_lonely_far_vector() -> None:
    x = torch.cat([torch.zeros(500, 2), torch.full((1, 2), 100.0)])
    assert float(seed_plusplus(x, 2, seeded(0)).max()) == 100.0


def test_spherical_centroids_are_unit_vectors() -> None:
    found = kmeans(torch.randn(200, 6, generator=seeded(0)) * 9, 8, 5, seeded(1), spherical=True)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(8))


def test_same_seed_same_centroids() -> None:
    x = torch.randn(300, 4, generator=seeded(0))
    assert torch.equal(kmeans(x, 9, 5, seeded(1)), kmeans(x, 9, 5, seeded(1)))


@pytest.mark.parametrize("bad", [torch.empty(0, 3), torch.tensor([[1.0, float("nan")]])])
def test_unusable_vectors_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"0 vectors|NaN"):
        kmeans(bad, 2, 1)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_allocation_is_exact_and_fair(sizes: list[int], total: int) -> None:
    cells = [s for s in sizes if s > 0]
    if not cells or total < len(cells):
        with pytest.raises(ValueError, match="at least one"):
            allocate(total, sizes)
        return
    share = allocate(total, sizes)
    assert sum(share) == total
    assert all((n >= 1) == (s > 0) for n, s in zip(share, sizes, strict=True))
    if sum(sizes) >= total:
        assert all(n <= s for n, s in zip(share, sizes, strict=True))
    order = sorted(zip(sizes, share, strict=True))
    assert all(a[1] <= b[1] or a[0] == b[0] for a, b in itertools.pairwise(order)), (
        "larger cells get no less"
    )


def test_allocation_takes_the_largest_remainders() -> None:
    assert allocate(100, [555, 303, 142]) == [56, 30, 14]
    assert allocate(7, [40, 40, 20]) == [3, 3, 1]
    assert allocate(5, [1000, 1, 1]) == [3, 1, 1]
    assert allocate(6, [4, 1, 1, 0]) == [4, 1, 1, 0]


def test_distance_to_one_vector_in_blocks_is_the_plain_one_bit_for_bit() -> None:
    x_NC = torch.randn(3000, 70, generator=torch.Generator().manual_seed(3))
    assert len(x_NC) * 70 > 2 * module.BLOCK_NUMBERS
    found = module._to_one(x_NC, x_NC[11])
    assert torch.equal(found, (x_NC - x_NC[11]).square().sum(-1))
    assert found[11] == 0


def test_equal_shares_are_equal_up_to_what_small_cells_hold() -> None:
    assert module.share_equally(12, [100, 100, 0, 100]) == [4, 4, 0, 4]
    assert module.share_equally(11, [100, 100, 100]) == [4, 4, 3]
    assert module.share_equally(12, [100, 2, 100]) == [5, 2, 5], (
        "what a small cell cannot use goes to the others"
    )
    assert module.share_equally(6, [1, 2, 3]) == [1, 2, 3]
    assert module.share_equally(8, [1, 2, 3]) == [3, 3, 2], "more codes than vectors: equal again"
    with pytest.raises(ValueError, match="2 centroids for 3 cells"):
        module.share_equally(2, [5, 5, 5])


def test_no_cell_gets_more_than_its_most_and_the_others_take_what_it_leaves() -> None:
    assert allocate(100, [800, 100, 100], [20, 900, 900]) == [20, 40, 40]
    assert allocate(12, [100, 60, 20, 0], [5, 5, 5, 0]) == [5, 5, 2, 0]
    assert module.share_equally(12, [100, 100, 100], [2, 9, 9]) == [2, 5, 5]


def test_vectors_without_a_direction_have_no_part_in_spherical_kmeans() -> None:
    x = torch.cat([torch.zeros(50, 3), torch.randn(40, 3, generator=seeded(0))])
    torch.testing.assert_close(
        kmeans(x, 20, 3, seeded(1), spherical=True).norm(dim=-1), torch.ones(20)
    )
    assert float(x[:50].abs().max()) == 0, "the argument is not written to"
    with pytest.raises(ValueError, match="no direction"):
        kmeans(torch.zeros(4, 3), 2, 1, spherical=True)
    c = torch.tensor([[1.0, 0.0]])
    assert torch.equal(
        move(c, torch.zeros(1, 2, dtype=torch.float64), torch.tensor([2]), spherical=True), c
    ), "cancelled"


def test_one_double_among_the_seeds_is_mended_without_a_look_at_all_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, looked = torch.arange(20_000).float()[:, None], []
    order = torch.randperm(len(x), generator=seeded(4))
    x[order[1]] = x[order[0]]
    inner = module.row_names

    def watched(rows: torch.Tensor) -> object:
        looked.append(len(rows))
        return inner(rows)

    monkeypatch.setattr(module, "row_names", watched)
    assert len(seed_random(x, 10, seeded(4)).unique()) == 10
    assert sum(looked) <= 10 + module.NAMED_ROWS
