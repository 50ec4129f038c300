"""Descriptions of why training workers failed.

A light module: Ray Train's controller imports it too.
"""

from __future__ import annotations

from collections.abc import Mapping

from smalti.errors import SmaltiError

LINE = 200
"""Characters shown of a line: Ray's advice about a dead worker fills a page."""
INNER = ("_base_exc", "health_check_failure", "cause", "__cause__")
"""Attributes of Ray's errors that hold the error they wrap."""


def failed_workers(failures: Mapping[int, BaseException]) -> str:
    """A line about which workers failed and why.

    Workers that died are named instead of those that lost the connection to them. Errors that the
    user sees at the end give "".
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
    """An error in one line: its first and its last line, each cut to `LINE`."""
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
