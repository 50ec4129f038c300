"""A store that goes away and comes back, one that refuses, and one that stays away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from smalti.workflows.tracking import outbox
from smalti.workflows.tracking.outbox import Outbox


class RefusedError(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


class Store:
    """Answers, or fails with `error`."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.numbers: list[int] = []
        self.calls: list[str] = []

    def take(self, part: list[int]) -> None:
        if self.error is not None:
            raise self.error
        self.numbers += part

    def call(self, name: str) -> Callable[[], None]:
        def made() -> None:
            self.take([])
            self.calls.append(name)

        return made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(outbox, "log", lines.append)
    return lines


def make(store: Store) -> Outbox:
    return Outbox("http://there", store.take, 3)


def test_what_is_told_while_the_store_is_away_arrives_later(
    told: list[str], monkeypatch: Any
) -> None:
    store = Store()
    box = make(store)
    box.add([1, 2], 60.0)
    assert store.numbers == [], "too few to send, and too soon"
    box.add([3], 60.0)
    assert store.numbers == [1, 2, 3]
    store.error = ConnectionError("refused\nby all")
    box.call(store.call("a picture"))
    box.add([4, 5, 6, 7], 0.0)
    assert store.numbers == [1, 2, 3] and box.left() == "4 numbers, 1 other entries"
    store.error = None
    box.add([8], 0.0)
    assert store.numbers == [1, 2, 3], "a store that was away is not asked all the time"
    monkeypatch.setattr(outbox, "AGAIN_AFTER_S", 0.0)
    box.add([9], 0.0)
    assert store.numbers == list(range(1, 10)) and store.calls == ["a picture"] and box.left() == ""
    assert len(told) == 2
    assert "http://there does not answer" in told[0] and told[0].endswith("refused")
    assert "answers again" in told[1] and "lost" not in told[1]


def test_what_is_refused_is_told_and_stops_nothing(told: list[str]) -> None:
    store = Store()
    box = make(store)
    store.error = RefusedError("no such run")
    box.add([1], 0.0)
    assert box.flush(now=True)
    store.error = None
    box.add([2], 0.0)
    assert box.flush(now=True) and store.numbers == [2]
    assert told == ["MLflow at http://there refused an entry, which is dropped: no such run"]


def test_one_call_that_fails_for_ever_does_not_keep_others_back(told: list[str]) -> None:
    store = Store()
    box = make(store)

    def fail() -> None:
        raise PermissionError("the picture's folder")

    box.call(fail)
    box.call(store.call("the end"))
    box.add([1], 0.0)
    assert not box.flush(now=True) and store.numbers == [1]
    assert not box.flush(now=True) and store.calls == ["the end"]
    assert box.left() == "1 other entries" and len(told) == 1


def test_what_is_kept_is_bounded(told: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(outbox, "KEPT_NUMBERS", 5)
    store = Store()
    box = make(store)
    store.error = ConnectionError("")
    for number in range(8):
        box.add([number], 0.0)
    assert box.left() == "5 numbers, 3 dropped before" and told[0].endswith("ConnectionError")
    store.error = None
    assert box.flush(now=True) and store.numbers == [3, 4, 5, 6, 7]
    assert told[-1].endswith("3 entries did not fit and are lost")
