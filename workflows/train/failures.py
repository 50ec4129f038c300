"""What went wrong in training workers, in words.

A light module: Ray Train's controller imports it too.
"""

from __future__ import annotations

from collections.abc import Mapping

from smalti.errors import SmaltiError

LINE = 200  # characters; Ray's advice about a dead worker is a page
INNER = (
    "_base_exc",
    "health_check_failure",
    "cause",
    "__cause__",
)  # where Ray's errors keep what they stand for


def failed_workers(failures: Mapping[int, BaseException]) -> str:
    """Which workers failed and why, in a line; "" where it is an error that the user sees at the
    end.

    One that died is named before those that lost their connection to it.
    """
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    causes = {rank: cause_of(failure) for rank, failure in sorted(failures.items())}
    if any(isinstance(cause, SmaltiError) for cause in causes.values()):
        return ""
    died = {
        rank: cause
        for rank, cause in causes.items()
        if isinstance(cause, ActorDiedError | ActorUnavailableError)
    }
    named = died or causes
    ranks = ", ".join(map(str, named))
    return f"worker(s) {ranks} {'died' if died else 'failed'}: {brief(next(iter(named.values())))}"


def brief(error: BaseException) -> str:
    """An error in a line: its first and its last, of each so much as fits."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    ends = [lines[0]] if len(lines) == 1 else [lines[0], lines[-1].strip()]
    return " … ".join(end if len(end) <= LINE else f"{end[:LINE]}…" for end in ends)


def cause_of(failure: BaseException) -> BaseException:
    """The error under Ray's wrappers."""
    for _ in range(8):
        inner = next(
            (getattr(failure, name) for name in INNER if getattr(failure, name, None)), None
        )
        if not isinstance(inner, BaseException):
            return failure
        failure = inner
    return failure
