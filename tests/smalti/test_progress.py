from __future__ import annotations

import io
import pickle

import numpy as np
import pytest

from smalti import progress
from smalti.progress import Progress, format_count, format_seconds
from smalti.tracking import NullTracker, Tracker


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found)
    return found


def test_plain_lines_come_at_most_every_few_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(80, "images", "tokens", stream=stream) as bar:
        for _ in range(80):
            clock.now += 0.125
            bar.update(1, loss=0.5)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tokens: 0/80 (0 %) images"
    assert lines[1] == "tokens: 40/80 (50 %) images, 8 images/s, 5 s left, loss 0.5"
    assert lines[-1] == "tokens: 80/80 (100 %) images, 8 images/s, loss 0.5, in 10 s"
    assert len(lines) <= 4
    assert "\r" not in stream.getvalue()


def test_a_terminal_has_one_line_redrawn(clock: Clock) -> None:
    stream = Terminal()
    with Progress(10, "steps", "train", stream=stream) as bar:
        for _ in range(10):
            clock.now += 1
            bar.update()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("in 10 s\n")
    assert text.count("\r") == 12


def test_what_stood_before_is_not_in_the_rate(clock: Clock) -> None:
    bar = Progress(100, "images", "x", done=90, stream=io.StringIO())
    clock.now += 2
    bar.update(2)
    assert bar.line(clock.now) == "x: 92/100 (92 %) images, 1 images/s, 8 s left"


def test_an_unknown_total_has_no_time_left(clock: Clock) -> None:
    bar = Progress(None, "images", "x", stream=io.StringIO())
    clock.now += 2
    bar.update(4)
    assert bar.line(clock.now) == "x: 4 images, 2 images/s"


def test_a_failure_is_shown_as_one(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(2, "images", "x", stream=stream):
        raise RuntimeError
    assert stream.getvalue().splitlines()[-1] == "x: 0/2 (0 %) images, stopped after 0 s"


def test_log_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress.log("corpus: done")
    assert capsys.readouterr() == ("", "corpus: done\n")


def test_numbers_for_people() -> None:
    assert [format_seconds(s) for s in (0, 59.4, 61, 3599, 3600, 7440)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "59 min 59 s",
        "1 h 00 min",
        "2 h 04 min",
    ]
    assert [format_count(v) for v in (0.1234, 12.34, 1234.5)] == ["0.123", "12.3", "1,234"]


def test_the_null_tracker_is_a_tracker_that_pickles() -> None:
    tracker = pickle.loads(pickle.dumps(NullTracker()))
    assert isinstance(tracker, Tracker)
    tracker.params({"a": 1})
    tracker.metrics({"loss": 1.0}, step=3)
    tracker.image("grid", np.zeros((2, 2, 3), np.uint8))
    tracker.tags({"a": "b"})
    assert tracker.child("stage").run_id is None
    tracker.finish("FAILED")
