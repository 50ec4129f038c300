"""Storage that fails for the moment, as object stores and networks do: the same call again, for about a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from smalti.errors import DataError

TRIES, PAUSE_S = 6, 2.0  # pauses double: 2, 4, 8, 16 and 32 s

T = TypeVar("T")


def again(action: Callable[..., T], *args: Any) -> T:
    """What `action(*args)` returns, tried again when storage fails; its DataError after the last try."""
    for number in range(TRIES - 1):
        try:
            return action(*args)
        except DataError:
            time.sleep(PAUSE_S * 2**number)
    return action(*args)
