"""One line of what `smalti doctor` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing", "problem"]
MARKS: dict[State, str] = {"ok": "ok", "note": "--", "missing": "??", "problem": "!!"}
MIN_DISK_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report. `missing` is optional, a `problem` must be fixed."""

    name: str
    state: State
    found: str
    fix: str = ""

    def line(self) -> str:
        text = f"{MARKS[self.state]}  {self.name:<16} {self.found}"
        return f"{text}\n    {'':<16} → {self.fix}" if self.fix else text


def gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
