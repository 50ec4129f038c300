"""Sub-codebooks against a masked flat search, and their start from data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.tokenizers.subcodes import (
    FlatCodebook,
    SubCodebooks,
    flatten_codes,
    grouped_kmeans,
    split_codes,
    vq_loss,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked_flat_search(p: Tensor, i: Tensor, codes: Tensor, num_sub: int) -> Tensor:
    """j by the definition: distances to all K·m rows, those of other semantic codes masked out."""
    distance = (p[:, None].double() - codes.double()).square().sum(-1)
    owner = torch.arange(len(codes)) // num_sub
    return distance.masked_fill(owner != i[:, None], torch.inf).argmin(-1) - i * num_sub


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_gathered_lookup_equals_the_masked_flat_search(
    num_semantic: int, num_sub: int, dim: int, seed: int
) -> None:
    torch.manual_seed(seed)
    book = SubCodebooks(num_semantic, num_sub, dim)
    p, i = torch.randn(50, dim), torch.randint(0, num_semantic, (50,))
    assert torch.equal(book.assign(p, i), masked_flat_search(p, i, book.codes.detach(), num_sub))


def test_ties_take_the_lowest_sub_code() -> None:
    book = SubCodebooks(2, 3, 2)
    with torch.no_grad():
        book.codes.zero_()
    assert book.assign(torch.randn(4, 2), torch.tensor([0, 1, 1, 0])).tolist() == [0, 0, 0, 0]


@given(st.integers(1, 200_000), st.integers(1, 64), st.data())
def test_flat_ids_and_pairs_are_one_to_one(
    num_semantic: int, num_sub: int, data: st.DataObject
) -> None:
    t = torch.tensor(
        data.draw(st.lists(st.integers(0, num_semantic * num_sub - 1), min_size=1, max_size=20))
    )
    i, j = split_codes(t, num_sub)
    assert bool(
        (i >= 0).all() and (i < num_semantic).all() and (j >= 0).all() and (j < num_sub).all()
    )
    assert torch.equal(flatten_codes(i, j, num_sub), t)


@given(st.integers(1, 1000), st.integers(1, 64), st.data())
def test_pairs_and_flat_ids_are_one_to_one(
    num_semantic: int, num_sub: int, data: st.DataObject
) -> None:
    i = torch.tensor([data.draw(st.integers(0, num_semantic - 1))])
    j = torch.tensor([data.draw(st.integers(0, num_sub - 1))])
    back = split_codes(flatten_codes(i, j, num_sub), num_sub)
    assert torch.equal(back[0], i)
    assert torch.equal(back[1], j)


def test_loss_and_gradients_are_those_of_the_paper() -> None:
    book = SubCodebooks(4, 3, 2, beta=0.25)
    p = torch.randn(2, 5, 2, requires_grad=True)
    i = torch.randint(0, 4, (2, 5))
    out = book(p, i)
    e = book.codes.detach()[i * 3 + out.ids]
    torch.testing.assert_close(out.q, e)
    torch.testing.assert_close(out.loss, 1.25 * (p.detach() - e).square().mean())
    out.loss.backward()
    torch.testing.assert_close(p.grad, 0.25 * 2 * (p.detach() - e) / p.numel())
    rows = (i * 3 + out.ids).flatten()
    wanted = torch.zeros(12, 2).index_add_(0, rows, (2 * (e - p.detach()) / p.numel()).view(-1, 2))
    torch.testing.assert_close(book.codes.grad, wanted)


def test_straight_through_gradient() -> None:
    book = SubCodebooks(4, 3, 2)
    p = torch.randn(2, 5, 2, requires_grad=True)
    weight = torch.randn(2, 5, 2)
    (book(p, torch.zeros(2, 5, dtype=torch.int64)).q * weight).sum().backward()
    torch.testing.assert_close(p.grad, weight)
    assert book.codes.grad is None or not book.codes.grad.any()


def test_start_finds_the_planted_sub_clusters_of_each_code() -> None:
    planted = torch.randn(5, 3, 4, generator=seeded(1)) * 10
    i = torch.arange(5).repeat_interleave(90)
    p = planted[i, torch.arange(450) % 3] + torch.randn(450, 4, generator=seeded(2)) * 0.05
    order = torch.randperm(450, generator=seeded(3))
    book = SubCodebooks(5, 3, 4)
    book.init_from(p[order], i[order], seeded(0))
    distance = torch.cdist(planted, book.codes.detach().view(5, 3, 4)).min(-1).values
    assert float(distance.max()) < 0.1


def test_start_of_codes_seen_seldom_or_never_is_near_and_distinct() -> None:
    p = torch.randn(200, 3, generator=seeded(0))
    i = torch.zeros(200, dtype=torch.int64)
    i[:2] = 1
    p[:2] += 50
    book = SubCodebooks(3, 4, 3)
    book.init_from(p, i, seeded(0))
    rows = book.codes.detach().view(3, 4, 3)
    assert bool(torch.isfinite(rows).all())
    for code in range(3):
        assert len(rows[code].unique(dim=0)) == 4
    assert float((rows[1].mean(0) - p[:2].mean(0)).norm()) < 3, (
        "a rare code starts at its own vectors"
    )
    assert float(rows[2].norm(dim=-1).max()) < 10, "a code never seen starts at the mean of all"


def test_start_is_deterministic_and_checks_its_input() -> None:
    p, i = (
        torch.randn(100, 3, generator=seeded(0)),
        torch.randint(0, 6, (100,), generator=seeded(1)),
    )
    left, right = SubCodebooks(6, 2, 3), SubCodebooks(6, 2, 3)
    left.init_from(p, i, seeded(4))
    right.init_from(p, i, seeded(4))
    assert torch.equal(left.codes, right.codes)
    with pytest.raises(ValueError, match="0 vectors"):
        left.init_from(p[:0], i[:0])
    with pytest.raises(ValueError, match="NaN"):
        left.init_from(p * float("nan"), i)
    with pytest.raises(ValueError, match="expected width 3"):
        left.assign(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))


def test_grouped_kmeans_equals_lloyd_on_each_group() -> None:
    x = torch.randn(3, 20, 2, generator=seeded(0))
    held = torch.ones(3, 20, dtype=torch.bool)
    held[1, 12:] = False
    found = grouped_kmeans(x, held, 4, 30)
    for g in range(3):
        mine = x[g][held[g]]
        ids = torch.cdist(mine, found[g]).argmin(-1)
        means = torch.stack([mine[ids == k].mean(0) for k in range(4)])
        torch.testing.assert_close(found[g], means)
        alone = grouped_kmeans(mine[None], torch.ones(1, len(mine), dtype=torch.bool), 4, 30)
        torch.testing.assert_close(found[g], alone[0])


def test_flat_codebook_searches_every_row_and_starts_from_data() -> None:
    book = FlatCodebook(20, 3)
    p = torch.randn(2, 30, 3)
    out = book(p)
    assert torch.equal(
        out.ids.flatten(), torch.cdist(p.view(-1, 3).double(), book.codes.double()).argmin(-1)
    )
    before = vq_loss(p, out.q, 0.25)
    book.init_from(p.view(-1, 3), None, seeded(0))
    after = book(p)
    assert vq_loss(p, after.q, 0.25) < before
