"""When a run writes checkpoints, and which of them are kept.

Decisions over plain values: no storage, no torch, no Ray. The loop asks when to write,
`Checkpoints` asks what to keep; both do the work themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from smalti.errors import ConfigError

HIGHEST = "max:"
"""Prefix of `train.best` for a metric whose highest value is the best."""


class Scored(Protocol):
    """What the policy needs to know of a complete checkpoint."""

    @property
    def step(self) -> int: ...

    @property
    def score(self) -> float | None: ...


S = TypeVar("S", bound=Scored)


@dataclass
class CheckpointPolicy:
    """When a run writes checkpoints, and which of them are kept.

    Every worker has one and calls it in the same steps; the answers are the same on all of them.

    Attributes:
        steps: steps of the run; a checkpoint follows the last one.
        every: steps between two checkpoints.
        keep: newest complete checkpoints to keep.
        best: metric whose best checkpoint is kept too: NAME for the lowest, max:NAME for the
            highest.
        resumable: whether the run writes checkpoints at all.
        preemptible: nodes may be taken away with notice; a checkpoint follows each notice.
        elastic: more workers may join; a checkpoint is written for them when they are waiting.
    """

    steps: int = 0
    every: int = 1
    keep: int = 2
    best: str | None = None
    resumable: bool = True
    preemptible: bool = False
    elastic: bool = False
    _last_step: int = field(default=-1, init=False)
    _noticed: Sequence[str] = field(default=(), init=False)
    _metric_checked: bool = field(default=False, init=False)

    # When

    def due(self, done: int) -> bool:
        """Whether a checkpoint follows `done` steps by the schedule."""
        return done % self.every == 0 or done == self.steps

    def asks_for_notices(self) -> bool:
        """Whether the loop has to ask about nodes that will be taken away."""
        return self.preemptible and self.resumable

    def is_new_notice(self, node_ids: Sequence[str]) -> bool:
        """Whether a notice names other nodes than the last one; it is remembered."""
        new = list(node_ids) != list(self._noticed)
        self._noticed = node_ids
        return new

    def asks_for_growth(self, done: int) -> bool:
        """Whether the loop has to ask if more workers wait for a checkpoint."""
        return self.elastic and done != self.steps

    def start(self, done: int) -> bool:
        """Whether to write a checkpoint now: once for each number of steps done."""
        if not self.resumable or done == self._last_step:
            return False
        self._last_step = done
        return True

    def resumed(self, done: int) -> None:
        """Remember that the run starts from a checkpoint after `done` steps."""
        self._last_step = done

    # Which

    def score(self, history: Sequence[Mapping[str, float]]) -> float | None:
        """Score of a checkpoint: the last logged value of the metric `best`."""
        metric = self._metric()
        values = [row[metric] for row in history if metric in row]
        return float(values[-1]) if values else None

    def check_metric(self, logged: Collection[str]) -> None:
        """Check `best` against the names that are logged, the first time only.

        Raises:
            ConfigError: `best` names none of them.
        """
        if self._metric_checked:
            return
        self._metric_checked = True
        if self.best is not None and self._metric() not in logged:
            names = ", ".join(sorted(logged))
            raise ConfigError(
                f"train.best={self.best} names no metric that this training logs from the start; "
                f"it logs {names}."
            )

    def to_remove(self, complete: Sequence[S]) -> list[S]:
        """Checkpoints that are neither among the newest `keep` nor the best."""
        kept = sorted(complete, key=lambda checkpoint: checkpoint.step)[-self.keep :]
        kept += self._best_of(complete)
        return [checkpoint for checkpoint in complete if checkpoint not in kept]

    def _best_of(self, complete: Sequence[S]) -> list[S]:
        """The best checkpoint, the earliest where several are; none without finite scores."""
        sign = -1.0 if (self.best or "").startswith(HIGHEST) else 1.0
        scored = [
            (sign * checkpoint.score, checkpoint.step, checkpoint)
            for checkpoint in complete
            if checkpoint.score is not None and math.isfinite(checkpoint.score)
        ]
        if self.best is None or not scored:
            return []
        return [min(scored, key=lambda entry: entry[:2])[2]]

    def _metric(self) -> str:
        return (self.best or "").removeprefix(HIGHEST)
