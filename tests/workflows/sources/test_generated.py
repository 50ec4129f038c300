"""Generated images."""

from __future__ import annotations

from smalti.workflows.sources import find_groups
from tests.workflows.sources.written import SECTION, collect


def test_generated_is_seeded_and_names_differ() -> None:
    first, again = (next(find_groups("generated:6", SECTION, 3)) for _ in range(2))
    assert list(first.samples()) == list(again.samples())
    ids = {one.data for name in ("generated:6", "generated:6:val") for one in collect(name)[0]}
    assert len(ids) == 12
    assert all(one.caption == f"a {one.label}" for one in collect("generated:6")[0])
