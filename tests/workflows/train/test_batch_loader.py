"""Micro batches of every step, in order, and errors of reading them."""

from __future__ import annotations

import pytest

from smalti.errors import DataError
from smalti.workflows.train.batch_loader import BatchLoader
from smalti.workflows.train.order import Order


class Numbers:
    sizes = (6, 6)

    def read(self, shard: int, row: int):
        if (shard, row) == (1, 3):
            raise DataError("row 1/3 is broken")
        return f"train/{shard:05d}", {"n": shard * 10 + row}


def loader(source, **changes) -> BatchLoader:
    settings = {"batch_size": 4, "micro": 2, "rank": 0, "world_size": 1, "threads": 2} | changes
    return BatchLoader(
        source, Order([6, 6], 0), lambda rows: {"n": [row.values["n"] for row in rows]}, **settings
    )


def test_the_loader_yields_every_step_in_order_cut_into_micro_batches() -> None:
    class Intact(Numbers):
        def read(self, shard, row):
            return f"train/{shard:05d}", {"n": shard * 10 + row}

    ours = loader(Intact())
    steps = list(ours.steps(0, 3))
    assert [step for step, _ in steps] == [0, 1, 2]
    assert all([len(b["n"]) for b in batches] == [2, 2] for _, batches in steps)
    assert sorted(n for _, batches in steps for b in batches for n in b["n"]) == [
        *range(6),
        *range(10, 16),
    ]
    assert ours.at(1) == steps[1][1]
    halves = [loader(Intact(), rank=rank, world_size=2, threads=1).at(2) for rank in range(2)]
    assert [n for half in halves for b in half for n in b["n"]] == [
        n for b in steps[2][1] for n in b["n"]
    ]


def test_an_error_while_reading_reaches_the_loop() -> None:
    with pytest.raises(DataError, match="row 1/3 is broken"):
        list(loader(Numbers()).steps(0, 3))
