"""Fixtures of several test files here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from smalti.workflows import corpus, corpus_look
from smalti.workflows.shard_tally import HERE


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus stage's workers in this process, one after the other: for what does not depend on Ray."""

    def here(items: Any, worker: Any, args: Any, resources: Any, *, model: bool, tally: Any) -> Iterator[Any]:
        made = worker(*args)
        for item in items:
            result = made.work(made.read(item))
            tally.add(HERE.drain())
            yield result

    monkeypatch.setattr(corpus_look, "run_shards", here)
    monkeypatch.setattr(corpus, "ensure_ray", lambda recipe: nullcontext())
