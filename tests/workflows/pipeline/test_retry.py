"""Retries: only what may pass is retried, each failed try is logged, the last error is raised."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from smalti import storage
from smalti.errors import DataError
from smalti.workflows.pipeline import retry as retries
from smalti.workflows.pipeline.retry import is_transient, retry, retry_storage


def caused(cause: BaseException) -> DataError:
    error = DataError("cannot read s3://bucket/x")
    error.__cause__ = cause
    return error


def answered(status: int) -> Exception:
    error = RuntimeError(f"HTTP {status}")
    error.status = status  # type: ignore[attr-defined]
    return error


class Failing:
    """Fails `times` times with an error, then returns its argument."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self, value: int) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return value


def test_an_error_that_passes_is_retried_and_each_try_is_logged() -> None:
    lines: list[str] = []
    call = Failing(TimeoutError("slow"), 2)
    found = retry(
        call,
        7,
        what="reading x",
        transient=lambda e: True,
        pauses_s=(0.0, 0.0, 0.0),
        say=lines.append,
    )
    assert (found, call.calls) == (7, 3)
    assert lines == [f"reading x failed (try {n} of 4), retrying in 0 s: slow" for n in (1, 2)]


def test_the_last_error_is_raised_after_the_last_try() -> None:
    lines: list[str] = []
    call = Failing(TimeoutError("slow"), 9)
    with pytest.raises(TimeoutError, match="slow"):
        retry(
            call,
            7,
            what="reading x",
            transient=lambda e: True,
            pauses_s=(0.0, 0.0),
            say=lines.append,
        )
    assert (call.calls, len(lines)) == (3, 2)


def test_an_error_that_stays_is_raised_at_once_without_a_line() -> None:
    lines: list[str] = []
    call = Failing(caused(OSError(errno.ENOSPC, "full")), 9)
    with pytest.raises(DataError):
        retry_storage(call, 7, say=lines.append)
    assert (call.calls, lines) == (1, [])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (caused(TimeoutError()), True),
        (caused(ConnectionResetError()), True),
        (caused(OSError(errno.EIO, "input/output error")), True),
        (caused(OSError("HTTP 503")), True),
        (caused(answered(503)), True),
        (caused(answered(408)), True),
        (caused(answered(425)), True),
        (caused(answered(429)), True),
        (caused(answered(400)), False),
        (caused(answered(403)), False),
        (caused(OSError("AWS Error ACCESS_DENIED during PutObject")), False),
        (caused(FileNotFoundError("no key")), False),
        (caused(PermissionError("403")), False),
        (caused(OSError(errno.EROFS, "read-only")), False),
        (caused(json.JSONDecodeError("bad", "", 0)), False),
        (DataError("train/00003: row 7 is damaged"), False),
        (KeyError("x"), False),
    ],
)
def test_what_may_pass(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


def test_a_missing_file_of_real_storage_is_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        retries.time, "sleep", lambda s: pytest.fail("waited for a file that does not exist")
    )
    with pytest.raises(DataError, match="nothing exists"):
        retry_storage(storage.read_bytes, str(tmp_path / "absent"))


def test_storage_is_named_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "STORAGE_PAUSES_S", (0.0,))
    lines: list[str] = []

    def read_json(path: str) -> str:
        if not lines:
            raise caused(TimeoutError("no answer"))
        return path

    assert retry_storage(read_json, "s3://bucket/x", say=lines.append) == "s3://bucket/x"
    assert lines == [
        "read_json s3://bucket/x failed (try 1 of 2), retrying in 0 s: cannot read s3://bucket/x"
    ]
