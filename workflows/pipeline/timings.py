"""What the workers of the shard pipeline tell beside their receipts: seconds by part of the work, and what was done again.

A worker says `with HERE.part("decode"):` and `HERE.count("kept")`; its actor sends what was noted along with each receipt,
and the driver sums it. Seconds are of all actors together, and of the driver where it lists a source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from smalti.workflows.pipeline.stage import StageRun

T = TypeVar("T")
# list: the source's files are found; start: the model is loaded; match: duplicates are found among the ids
PARTS = ("list", "start", "read", "decode", "match", "model", "write")
COUNTS = {
    "kept": "shards or groups kept of an earlier try",
    "remade": "torn or stale shards made again",
    "restarts": "lost actors started again",
}
LEFT_OUT = {
    "half_pairs": "questions without an answer, or answers without a question, left out",
    "late_texts": "texts that lie too far behind an image that has others, left out",
}


class Tally:
    """Seconds by part and counts, by name."""

    def __init__(self) -> None:
        self.noted: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the wall-clock time of the block to a part of `PARTS`."""
        assert name in PARTS, name
        started = time.monotonic()
        try:
            yield
        finally:
            self.add({f"seconds/{name}": time.monotonic() - started})

    def timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that each takes to come added to a part of `PARTS`."""
        rest = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(rest)
                except StopIteration:
                    return
            yield item

    def count(self, name: str, number: int = 1) -> None:
        """So many more of a thing of `COUNTS` or of `LEFT_OUT`."""
        assert name in COUNTS or name in LEFT_OUT, name
        if number:
            self.add({f"retried/{name}" if name in COUNTS else f"left_out/{name}": number})

    def add(self, noted: Mapping[str, float]) -> None:
        """Add what another tally holds."""
        for name, value in noted.items():
            self.noted[name] = self.noted.get(name, 0) + value

    def drain(self) -> dict[str, float]:
        """What was noted since the last call."""
        noted, self.noted = self.noted, {}
        return noted

    def counted(self) -> dict[str, int]:
        """The counts that are not 0, named as the progress line shows them."""
        found = {name: int(self.noted.get(f"retried/{name}", 0)) for name in COUNTS}
        return {name: number for name, number in found.items() if number}

    def scores(self) -> dict[str, float]:
        """For the artifact's record: `seconds/<part>` of this try, and every `retried/<count>`, 0 too; `left_out/<what>`."""
        parts = {f"seconds/{name}": self.noted.get(f"seconds/{name}") for name in PARTS}
        counts = {f"retried/{name}": int(self.noted.get(f"retried/{name}", 0)) for name in COUNTS}
        counts |= {name: int(number) for name, number in self.noted.items() if name.startswith("left_out/")}
        return {name: round(value, 3) for name, value in parts.items() if value is not None} | counts

    def told(self) -> list[str]:
        """Lines for people: the share of each part with the slowest named, and what was done again."""
        parts = {name: self.noted.get(f"seconds/{name}", 0.0) for name in PARTS}
        total, lines = sum(parts.values()), []
        if total > 0:
            order = sorted((name for name in PARTS if parts[name] > 0), key=lambda name: -parts[name])
            shares = ", ".join(f"{name} {100 * parts[name] / total:.0f} %" for name in order)
            lines.append(f"{shares} of {total:.1f} worker seconds: {order[0]} is the slowest part")
        again = [f"{number:,} {COUNTS[name]}" for name, number in self.counted().items()]
        left = [
            f"{int(self.noted[name]):,} {told}"
            for one, told in LEFT_OUT.items()
            if (name := f"left_out/{one}") in self.noted
        ]
        return [*lines, *([", ".join(again)] if again else []), *left]


HERE = Tally()  # of this process


@contextmanager
def tallied(run: StageRun) -> Iterator[Tally]:
    """A tally of a whole stage: at the end the stage says which part was slowest, and its record gets the seconds and
    counts as scores."""
    tally = Tally()
    yield tally
    for line in tally.told():
        run.log(line)
    run.scores |= tally.scores()


@contextmanager
def shown(run: StageRun, tally: Tally, total: int, unit: str = "images") -> Iterator[Callable[..., None]]:
    """A progress line, and a function that takes the units of a receipt and what else the line is to show.

    It shows what was done again too; and where the units are groups, `images` (all so far) with their rate.
    """
    with run.progress(total, unit) as bar:
        kept, seen, stood, started = tally.counted().get("kept", 0), 0, 0, time.monotonic()

        def update(units: int, **info: float) -> None:
            nonlocal kept, seen, stood
            found, images = tally.counted(), int(info.get("images", 0))
            if found.get("kept", 0) > kept:
                kept = found["kept"]
                bar.stood(units)
                units, stood = 0, stood + images - seen
            seen = images
            elapsed_s = time.monotonic() - started
            if images > stood and elapsed_s > 0:
                info["images/s"] = (images - stood) / elapsed_s
            bar.update(units, **info, **found)

        yield update


@contextmanager
def shard_progress(run: StageRun, total: int, unit: str = "images") -> Iterator[tuple[Tally, Callable[..., None]]]:
    """`tallied` and `shown` of a stage with one pipeline: the tally for `run_shards`, and the line's function."""
    with tallied(run) as tally, shown(run, tally, total, unit) as update:
        yield tally, update
