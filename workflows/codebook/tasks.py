"""Ray tasks whose results come in the order of their items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from smalti.errors import SmaltiError


def in_order(
    task: Callable[..., object],
    items: Sequence[tuple[object, ...]],
    workers: int,
    gpus: float = 0,
    num_parts: int = 0,
) -> Iterator[Any]:
    """Run `task(*item)` as Ray tasks; yield the results in the order of the items.

    Args:
        workers: tasks at once.
        num_parts: if set, a task yields its result and then so many parts, which are yielded as
            references.

    Raises:
        SmaltiError: of a task, unchanged.
    """
    import ray
    from ray.exceptions import RayTaskError

    remote = ray.remote(num_cpus=1, num_gpus=gpus, num_returns=1 + num_parts)(task)
    waiting: list[Any] = []
    for number in range(len(items)):
        while len(waiting) < min(len(items), number + workers):
            waiting.append(remote.remote(*items[len(waiting)]))
        mine = waiting[number]
        try:
            yield (ray.get(mine[0]), *mine[1:]) if num_parts else ray.get(mine)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, SmaltiError) else error) from None
        waiting[number] = None
