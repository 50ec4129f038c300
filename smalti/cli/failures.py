"""Errors of smalti inside the errors that Ray wraps around them."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.errors import SmaltiError

_INNER = ("cause", "_base_exc", "controller_failure", "__cause__", "__context__")


def message_of(error: BaseException) -> str | None:
    """Message of the first `SmaltiError` in `error` and the errors it wraps, or None.

    The classes of smalti come first: Ray also raises a generated subclass whose message is a remote
    traceback.
    """
    found = [item for item in _inside(error) if isinstance(item, SmaltiError)]
    own = [item for item in found if type(item).__module__.startswith("smalti")]
    best = (own or found)[:1]
    return str(best[0]) if best else None


def _inside(error: BaseException) -> Iterator[BaseException]:
    """`error`, then what it was raised from, what a remote task or a training worker failed with,
    and so on.
    """
    queue = [error]
    seen = {id(error)}
    while queue:
        item = queue.pop(0)
        yield item
        inner = [getattr(item, name, None) for name in _INNER]
        workers = getattr(item, "worker_failures", None)
        inner += list(workers.values()) if isinstance(workers, dict) else []
        for below in inner:
            if isinstance(below, BaseException) and id(below) not in seen:
                seen.add(id(below))
                queue.append(below)
