"""One training sequence, and how it is put together from parts.

Axes: L length of a sequence, N visual places, R depth of a place's codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from smalti.mllm.losses import IGNORE

Kind = Literal["caption_to_image", "image_to_caption", "qa", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence.

    Attributes:
        kind: what the sequence teaches.
        ids: int64 (L,).
        labels: int64 (L,); `ids[i]` if that token is predicted (from those before it), else IGNORE.
        answers: bool (L,); True for tokens of answers.
        segments: int64 (L,); 0 for what the whole sequence sees, k > 0 for what only the k-th
            segment sees.
        positions: int64 (L,); each segment continues from the end of the shared part.
        num_cut: text tokens that were cut so that the image fits max_length.
        codes: int64 (N, 2, R), the codes of the visual places, if a place holds several.
    """

    kind: Kind
    ids: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    num_cut: int = 0
    codes: np.ndarray | None = None


class SequenceParts:
    """A sequence that is being built."""

    def __init__(self, kind: Kind, max_length: int) -> None:
        self.kind = kind
        self.max_length = max_length
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.answers: list[bool] = []
        self.segments: list[int] = []
        self.positions: list[int] = []
        self.segment = 0
        self.next_position = 0
        self.shared_length = 0
        self.num_cut = 0

    def begin_segment(self) -> None:
        """Start a segment: it sees the shared part and itself, not other segments.

        The shared part is all before the first segment.
        """
        if self.segment == 0:
            self.shared_length = self.length
        self.segment += 1
        self.next_position = self.shared_length

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self.ids)

    def add(self, ids: Sequence[int], predicted: bool = True, answer: bool = False) -> None:
        """Append tokens.

        Args:
            ids: token ids.
            predicted: whether the loss counts them.
            answer: whether they are tokens of an answer.
        """
        self.ids.extend(ids)
        self.labels.extend(ids if predicted else [IGNORE] * len(ids))
        self.answers.extend([answer] * len(ids))
        self.segments.extend([self.segment] * len(ids))
        self.positions.extend(range(self.next_position, self.next_position + len(ids)))
        self.next_position += len(ids)

    def add_cut(
        self, ids: Sequence[int], room: int, predicted: bool = True, answer: bool = False
    ) -> None:
        """Append `ids`, cut so that `room` positions stay free."""
        fits = max(0, self.max_length - self.length - room)
        self.num_cut += max(0, len(ids) - fits)
        self.add(ids[:fits], predicted, answer)

    def sequence(self) -> TokenSequence:
        """The sequence of all parts."""
        for place in range(len(self.ids)):
            if place == 0 or self.segments[place] > max(1, self.segments[place - 1]):
                self.labels[place] = IGNORE  # the token before it is from another segment
        return TokenSequence(
            self.kind,
            np.array(self.ids, dtype=np.int64),
            np.array(self.labels, dtype=np.int64),
            np.array(self.answers, dtype=bool),
            np.array(self.segments, dtype=np.int64),
            np.array(self.positions, dtype=np.int64),
            self.num_cut,
        )
