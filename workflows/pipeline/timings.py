"""Seconds by part of the work, and counts, of the shard pipeline.

A worker calls `with PROCESS_TALLY.part("decode"):` and `PROCESS_TALLY.count("kept")`; its actor sends the sums with
each receipt, and the driver adds them up. Seconds are summed over all actors, and over the driver
where it lists a source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from smalti.workflows.pipeline.stage import StageRun

T = TypeVar("T")
# list: find the source's files; start: load the model; match: find duplicates among the ids
PARTS = ("list", "start", "read", "decode", "match", "model", "write")
COUNTS = {
    "kept": "shards or groups kept from an earlier run",
    "remade": "damaged or outdated shards written again",
    "restarts": "lost actors restarted",
}
LEFT_OUT = {
    "half_pairs": "questions without an answer, or answers without a question, left out",
    "late_texts": "texts too far behind an image that already has others, left out",
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
        """Yield the items; add the wait for each to a part of `PARTS`."""
        rest = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(rest)
                except StopIteration:
                    return
            yield item

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count of `COUNTS` or of `LEFT_OUT`."""
        assert name in COUNTS or name in LEFT_OUT, name
        if number:
            self.add({f"retried/{name}" if name in COUNTS else f"left_out/{name}": number})

    def add(self, noted: Mapping[str, float]) -> None:
        """Add the sums of another tally."""
        for name, value in noted.items():
            self.noted[name] = self.noted.get(name, 0) + value

    def drain(self) -> dict[str, float]:
        """The sums since the last call; resets them."""
        noted = self.noted
        self.noted = {}
        return noted

    def counted(self) -> dict[str, int]:
        """The counts that are not 0, named as the progress line shows them."""
        found = {name: int(self.noted.get(f"retried/{name}", 0)) for name in COUNTS}
        return {name: number for name, number in found.items() if number}

    def scores(self) -> dict[str, float]:
        """Scores for the artifact's record.

        `seconds/<part>` of this run, every `retried/<count>` (0 included), and `left_out/<what>`.
        """
        parts = {f"seconds/{name}": self.noted.get(f"seconds/{name}") for name in PARTS}
        counts = {f"retried/{name}": int(self.noted.get(f"retried/{name}", 0)) for name in COUNTS}
        counts |= {
            name: int(number) for name, number in self.noted.items() if name.startswith("left_out/")
        }
        return {
            name: round(value, 3) for name, value in parts.items() if value is not None
        } | counts

    def lines(self) -> list[str]:
        """Log lines: the share of each part, the slowest part, and the counts."""
        parts = {name: self.noted.get(f"seconds/{name}", 0.0) for name in PARTS}
        total = sum(parts.values())
        lines = []
        if total > 0:
            order = sorted(
                (name for name in PARTS if parts[name] > 0), key=lambda name: -parts[name]
            )
            shares = ", ".join(f"{name} {100 * parts[name] / total:.0f} %" for name in order)
            lines.append(f"{shares} of {total:.1f} worker seconds: {order[0]} is the slowest part")
        again = [f"{number:,} {COUNTS[name]}" for name, number in self.counted().items()]
        left = [
            f"{int(self.noted[name]):,} {text}"
            for one, text in LEFT_OUT.items()
            if (name := f"left_out/{one}") in self.noted
        ]
        return [*lines, *([", ".join(again)] if again else []), *left]


PROCESS_TALLY = Tally()  # of this process


@contextmanager
def tallied(run: StageRun) -> Iterator[Tally]:
    """A tally of a whole stage.

    At the end its lines are logged, and the seconds and counts are added to the stage's scores.
    """
    tally = Tally()
    yield tally
    for line in tally.lines():
        run.log(line)
    run.scores |= tally.scores()


@contextmanager
def shown(
    run: StageRun, tally: Tally, total: int, unit: str = "images"
) -> Iterator[Callable[..., None]]:
    """A progress bar, and the function that updates it.

    The function takes the units of a receipt and further numbers to show. The bar also shows the
    retries; where the units are groups, pass `images` (the total so far) to show their rate.
    """
    with run.progress(total, unit) as bar:
        kept = tally.counted().get("kept", 0)
        seen = 0
        kept_images = 0
        started = time.monotonic()

        def update(units: int, **info: float) -> None:
            nonlocal kept, seen, kept_images
            found = tally.counted()
            images = int(info.get("images", 0))
            if found.get("kept", 0) > kept:
                kept = found["kept"]
                bar.skip(units)
                units = 0
                kept_images += images - seen
            seen = images
            elapsed_s = time.monotonic() - started
            if images > kept_images and elapsed_s > 0:
                info["images/s"] = (images - kept_images) / elapsed_s
            bar.update(units, **info, **found)

        yield update


@contextmanager
def shard_progress(
    run: StageRun, total: int, unit: str = "images"
) -> Iterator[tuple[Tally, Callable[..., None]]]:
    """Tally and progress bar of a stage with one pipeline.

    Yields the tally for `run_shards`, and the function that updates the bar.
    """
    with tallied(run) as tally, shown(run, tally, total, unit) as update:
        yield tally, update
