"""The order of samples is a pure function of (seed, step): properties."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.workflows.train.order import Mixed, Order

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
WINDOW, SEED = st.integers(1, 5), st.integers(0, 3)


def places(order: Order, step: int, batch_size: int) -> list[tuple[int, int]]:
    batch = order.batch(step, batch_size)
    return list(zip(batch.shard.tolist(), batch.row.tolist(), strict=True))


@given(
    sizes=SIZES, window=WINDOW, seed=SEED, batch_size=st.integers(1, 17), epochs=st.integers(1, 3)
)
@settings(max_examples=60, deadline=None)
def test_every_row_comes_exactly_once_an_epoch(sizes, window, seed, batch_size, epochs) -> None:
    order, rows = Order(sizes, seed, window), sum(sizes)
    steps = -(-rows * epochs // batch_size)
    seen: dict[int, Counter] = {}
    for step in range(steps):
        batch = order.batch(step, batch_size)
        assert sorted(batch.index.tolist()) == list(
            range(step * batch_size, (step + 1) * batch_size)
        )
        for epoch, shard, row in zip(
            batch.epoch.tolist(), batch.shard.tolist(), batch.row.tolist(), strict=True
        ):
            seen.setdefault(epoch, Counter())[shard, row] += 1
    every = Counter((shard, row) for shard, size in enumerate(sizes) for row in range(size))
    for epoch in range(epochs):
        assert seen[epoch] == every


@given(
    sizes=SIZES,
    window=WINDOW,
    seed=SEED,
    share=st.integers(1, 4),
    worlds=st.permutations([1, 2, 3, 4]),
)
@settings(max_examples=60, deadline=None)
def test_the_workers_shares_are_the_global_batch(sizes, window, seed, share, worlds) -> None:
    batch_size = 12 * share
    whole = places(Order(sizes, seed, window), 3, batch_size)
    for world in worlds:
        order = Order(sizes, seed, window)
        parts = [order.part(3, batch_size, rank, world) for rank in range(world)]
        assert [
            p for part in parts for p in zip(part.shard.tolist(), part.row.tolist(), strict=True)
        ] == whole


@given(sizes=SIZES, window=WINDOW, seed=SEED, first=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_step_does_not_depend_on_the_steps_before(sizes, window, seed, first) -> None:
    walked = Order(sizes, seed, window)
    for step in range(first):
        walked.batch(step, 4)
    assert places(walked, first, 4) == places(Order(sizes, seed, window), first, 4)


def test_epochs_and_seeds_differ_and_rows_mix_within_windows_only() -> None:
    order = Order([50] * 8, seed=0, window=2)
    first, second = places(order, 0, 400), places(order, 1, 400)
    assert sorted(first) == sorted(second) and first != second
    assert places(Order([50] * 8, seed=1, window=2), 0, 400) != first
    for window in range(4):
        shards = {
            shard
            for step in range(5)
            for shard in order.batch(window * 5 + step, 20).shard.tolist()
        }
        assert len(shards) == 2


def test_a_worker_keeps_to_few_shards_of_a_window() -> None:
    """16 shards a window, 16 workers: each reads about its own shard, not all sixteen."""
    order = Order([1000] * 64, seed=0, window=16)
    touched = {
        shard
        for step in range(16_000 // 1024)
        for shard in order.part(step, 1024, 7, 16).shard.tolist()
    }
    assert len(touched) <= 4


def test_memory_does_not_grow_with_the_rows() -> None:
    order = Order([1000] * 50_000, seed=0, window=16)
    batch = order.batch(40_000, 1024)
    assert len(np.unique(batch.shard)) <= 32
    held = sum(rows.nbytes + offsets.nbytes for rows, offsets in order._windows.values())
    assert held < 2_000_000


@pytest.mark.parametrize("sizes", [[], [0, 0], [3, -1]])
def test_no_rows_is_an_error(sizes) -> None:
    with pytest.raises(ValueError, match="shard sizes"):
        Order(sizes, 0)


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not divide among 3"):
        Order([10], 0).part(0, 4, 0, 3)


@given(
    rows=SIZES,
    texts=SIZES,
    shares=st.lists(st.floats(0, 0.9), min_size=1, max_size=3),
    stage=st.integers(1, 3),
    seed=SEED,
)
@settings(max_examples=40, deadline=None)
def test_texts_and_rows_come_once_an_epoch_each_by_its_own_count(
    rows, texts, shares, stage, seed
) -> None:
    """Stages of their own shares begin on the way.

    A step's texts are spread over the workers, whatever their number.
    """
    batch_size, steps = 6, 12
    starts = [k * stage * batch_size for k in range(len(shares))]
    mixed = Mixed(Order(rows, seed, 2), Order(texts, seed + 1, 2), starts, shares)
    seen: dict[tuple[bool, int], Counter] = {}
    for step in range(steps):
        batch = mixed.batch(step, batch_size)
        assert sorted(batch.index.tolist()) == list(
            range(step * batch_size, (step + 1) * batch_size)
        )
        is_text = batch.shard >= len(rows)
        assert is_text.sum() == pytest.approx(
            batch_size * shares[min(step // stage, len(shares) - 1)], abs=1.001
        )
        for world in (1, 2, 3, 6):
            counts = [
                int((mixed.part(step, batch_size, rank, world).shard >= len(rows)).sum())
                for rank in range(world)
            ]
            assert sum(counts) == is_text.sum() and max(counts) - min(counts) <= 1
        for text, epoch, shard, row in zip(
            is_text, batch.epoch, batch.shard, batch.row, strict=True
        ):
            seen.setdefault((bool(text), int(epoch)), Counter())[int(shard), int(row)] += 1
    for text, sizes, shift in ((False, rows, 0), (True, texts, len(rows))):
        every = Counter(
            (shard + shift, row) for shard, size in enumerate(sizes) for row in range(size)
        )
        epochs = sorted(epoch for kind, epoch in seen if kind == text)
        assert epochs == list(range(len(epochs)))
        for epoch in epochs:
            assert seen[text, epoch] == every or (
                epoch == epochs[-1] and seen[text, epoch] <= every
            )


def test_near_a_step_lie_its_window_and_a_workers_shards_of_the_next() -> None:
    order = Order([10] * 12, seed=0, window=4)
    for step in range(24):  # two epochs
        near = order.near(step, 10, 1, 2)
        batch = order.batch(step, 10)
        assert set(batch.shard.tolist()) <= near.around and len(near.around) == 4
        assert len(near.own) == len(near.next) == 2 and set(near.own) <= near.around
        after = order.near(step - step % 4 + 4, 10, 1, 2)
        assert near.next == after.own
    assert len(order.near(3, 12, 0, 1).around) == 8, "a batch that lies in two windows"
    mixed = Mixed(order, Order([5] * 3, 1), [0], [0.5])
    assert mixed.near(0, 10, 0, 1).around == order.near(0, 5, 0, 1).around | {12, 13, 14}
