"""Rows of token shards and text to training sequences: ids, labels, and batches of them.

Axes: T codes of an image, L length of a sequence. The formats stand in `smalti.mllm.prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from smalti.errors import ConfigError, VocabularyError
from smalti.mllm.losses import IGNORE
from smalti.mllm.packing import best_fit, pack
from smalti.mllm.prompts import TextEncoder, clean
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import Mixture

Kind = Literal["caption_to_image", "image_to_caption", "qa", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence.

    `labels[i]` is `ids[i]` where that token is predicted (from what stands before), else IGNORE.
    """

    kind: Kind
    ids: np.ndarray  # int64 (L,)
    labels: np.ndarray  # int64 (L,)
    answers: np.ndarray  # bool (L,): tokens of answers
    segments: (
        np.ndarray
    )  # int64 (L,): 0 what all of the sequence sees, k > 0 what only the k-th segment sees
    positions: np.ndarray  # int64 (L,): each segment goes on where the shared part ended
    num_cut: int = 0  # text tokens left out so that the image fits max_length
    codes: np.ndarray | None = (
        None  # int64 (N, 2, R): of its visual places, where a place holds several
    )


class SequenceBuilder:
    """Builds the sequences of one model; see `smalti.mllm.prompts` for the formats.

    dense: every token is predicted (captions, questions and codes included), which is what teaches
    a small model to look; else only what is asked for: the image of a caption, the caption of an
    image, the answers. dense_images: of a dense sequence the codes of an image to be understood
    too. isolate_questions: the questions of one sequence see the image and themselves, never each
    other (an earlier answer gives the next one away), so that each is trained as it is asked:
    alone.
    """

    def __init__(
        self,
        hf_tokenizer: Any,
        vocabulary: VisualVocabulary,
        *,
        mixture: Mixture = Mixture(),  # noqa: B008 (frozen)
        uncond_probability: float = 0.1,
        questions_per_image: int = 1,
        max_length: int = 2048,
        dense: bool = True,
        dense_images: bool = True,
        isolate_questions: bool = True,
    ) -> None:
        self.text = TextEncoder(hf_tokenizer, vocabulary)
        self.vocabulary = vocabulary
        self.mixture = mixture
        self.uncond_probability = uncond_probability
        self.questions_per_image = questions_per_image
        self.max_length = max_length
        self.dense, self.dense_images = dense, dense_images
        self.isolate_questions = isolate_questions
        if not any(getattr(mixture, kind) for kind in KINDS):
            raise ConfigError(
                "Every weight of mllm.mixture is 0, so there is nothing to train on. Set one above 0."
            )

    def kinds_for(self, row: Row) -> tuple[Kind, ...]:
        """The kinds that this row can become: an image without any caption can still be drawn
        unconditionally.
        """
        if row.get("codes") is None:
            return ("text",) if clean(row.get("text")) else ()
        kinds: list[Kind] = ["caption_to_image"]
        if caption_of(row):
            kinds.append("image_to_caption")
        if questions_of(row):
            kinds.append("qa")
        return tuple(kinds)

    def sample_kind(
        self, row: Row, rng: np.random.Generator, mixture: Mixture | None = None
    ) -> Kind | None:
        """One of the row's kinds by the weights of `mixture` (default: the builder's); None where
        it wants none of them.
        """
        mixture = mixture or self.mixture
        kinds = [kind for kind in self.kinds_for(row) if getattr(mixture, kind) > 0]
        if not kinds:
            return None
        weights = np.array([getattr(mixture, kind) for kind in kinds])
        return kinds[
            int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))
        ]

    def build(self, kind: Kind, row: Row, rng: np.random.Generator) -> TokenSequence:
        """The sequence of a row.

        Images are never cut: one that does not fit raises ConfigError; text that does not is cut.

        The same row and state of `rng` give the same sequence. Codes beyond the vocabulary raise
        VocabularyError.
        """
        if kind == "text":
            return self._text(row)
        image = self._image(row)
        if kind == "caption_to_image":
            return self._draw(
                image, "" if rng.random() < self.uncond_probability else caption_of(row)
            )
        if kind == "image_to_caption":
            return self._describe(image, caption_of(row))
        return self._ask(image, questions_of(row), rng)

    def _text(self, row: Row) -> TokenSequence:
        parts = _Parts("text", self.max_length)
        parts.add(self.text.begin())
        parts.add_cut(self.text(clean(row.get("text"))), room=1)
        parts.add([self.vocabulary.eos])
        return parts.sequence()

    def _draw(self, image: list[int], caption: str) -> TokenSequence:
        vocabulary, parts = self.vocabulary, _Parts("caption_to_image", self.max_length)
        parts.add(self.text.begin(), predicted=self.dense)
        parts.add_cut(self.text(caption), room=len(image) + 3, predicted=self.dense)
        parts.add([vocabulary.boi], predicted=self.dense)
        parts.add([*image, vocabulary.eoi, vocabulary.eos])
        return parts.sequence()

    def _describe(self, image: list[int], caption: str) -> TokenSequence:
        parts = self._seen("image_to_caption", image)
        parts.add_cut(self.text(caption), room=1)
        parts.add([self.vocabulary.eos])
        return parts.sequence()

    def _ask(
        self, image: list[int], questions: list[tuple[str, str]], rng: np.random.Generator
    ) -> TokenSequence:
        parts = self._seen("qa", image)
        chosen = rng.permutation(len(questions))[: self.questions_per_image]
        for nth, index in enumerate(chosen):
            question, answer = (
                self.text.question_prompt(questions[index][0]),
                self.text(questions[index][1]),
            )
            length = len(question) + len(answer) + len(self.text.line_end)
            if nth > 0 and parts.length + length + 1 > self.max_length:
                parts.num_cut += length
                continue
            if self.isolate_questions:
                parts.begin_segment()
            parts.add_cut(
                question, room=len(answer) + len(self.text.line_end) + 1, predicted=self.dense
            )
            parts.add_cut(answer, room=len(self.text.line_end) + 1, answer=True)
            parts.add_cut(self.text.line_end, room=1)
        parts.add([self.vocabulary.eos])
        return parts.sequence()

    def _seen(self, kind: Kind, image: list[int]) -> _Parts:
        """A sequence that begins with an image to be understood."""
        parts = _Parts(kind, self.max_length)
        parts.add(self.text.begin(), predicted=self.dense)
        parts.add([self.vocabulary.und_start], predicted=self.dense)
        parts.add(image, predicted=self.dense and self.dense_images)
        parts.add([self.vocabulary.und_end], predicted=self.dense)
        return parts

    def _image(self, row: Row) -> list[int]:
        codes = np.asarray(row["codes"]).reshape(-1)
        if len(codes) and (int(codes.min()) < 0 or int(codes.max()) >= self.vocabulary.num_codes):
            self.vocabulary.check_codes(torch.from_numpy(codes.astype(np.int64)), _where(row))
        if not len(codes):
            raise VocabularyError(f"{_where(row)} holds no visual codes. Tokenize again.")
        needed = len(codes) + len(self.text.begin()) + 3
        if needed > self.max_length:
            raise ConfigError(
                f"mllm.max_length={self.max_length} cannot hold an image of {len(codes)} codes with its delimiters, "
                f"and images are never cut. Set mllm.max_length to at least {needed + 32} (room for text too)."
            )
        return (codes.astype(np.int64) + self.vocabulary.first_visual).tolist()


class _Parts:
    """A sequence in the making."""

    def __init__(self, kind: Kind, max_length: int) -> None:
        self.kind, self.max_length = kind, max_length
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.answers: list[bool] = []
        self.segments: list[int] = []
        self.positions: list[int] = []
        self.segment = self.next_position = self.shared_length = 0
        self.num_cut = 0

    def begin_segment(self) -> None:
        """What follows sees the shared part (all before the first segment) and itself, not the
        other segments.
        """
        if self.segment == 0:
            self.shared_length = self.length
        self.segment += 1
        self.next_position = self.shared_length

    @property
    def length(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[int], predicted: bool = True, answer: bool = False) -> None:
        self.ids.extend(ids)
        self.labels.extend(ids if predicted else [IGNORE] * len(ids))
        self.answers.extend([answer] * len(ids))
        self.segments.extend([self.segment] * len(ids))
        self.positions.extend(range(self.next_position, self.next_position + len(ids)))
        self.next_position += len(ids)

    def add_cut(
        self, ids: Sequence[int], room: int, predicted: bool = True, answer: bool = False
    ) -> None:
        """Add as much of `ids` as leaves `room` positions free."""
        fits = max(0, self.max_length - self.length - room)
        self.num_cut += max(0, len(ids) - fits)
        self.add(ids[:fits], predicted, answer)

    def sequence(self) -> TokenSequence:
        for place in range(len(self.ids)):
            if place == 0 or self.segments[place] > max(1, self.segments[place - 1]):
                self.labels[place] = IGNORE  # the token before it is nothing that it follows
        return TokenSequence(
            self.kind,
            np.array(self.ids, dtype=np.int64),
            np.array(self.labels, dtype=np.int64),
            np.array(self.answers, dtype=bool),
            np.array(self.segments, dtype=np.int64),
            np.array(self.positions, dtype=np.int64),
            self.num_cut,
        )


def caption_of(row: Row) -> str:
    """A row's caption, else its label, on one line; empty where it has neither."""
    return clean(row.get("caption")) or clean(row.get("label"))


def questions_of(row: Row) -> list[tuple[str, str]]:
    """A row's (question, answer) pairs that hold both."""
    pairs = ((clean(pair["question"]), clean(pair["answer"])) for pair in row.get("qa") or ())
    return [(question, answer) for question, answer in pairs if question and answer]


def collate(
    sequences: Sequence[TokenSequence], pad: int, room: int | None = None
) -> dict[str, Tensor]:
    """A batch for `UnifiedModel`, right-padded to (B, L): input_ids, labels, attention_mask int64,
    answer_mask bool.

    Short sequences share a row, so B may be below their number. Rows are as long as the longest
    sequence (`best_fit`), or with `room` about that long (`pack`). Where a row is shared or a
    sequence has segments there are also position_ids, document_ids and segment_ids int64 (padding:
    document −1); see `visible_mask`. Where visual places hold several codes there are `codes` int64
    (N, 2, R), of all places of the batch in reading order.
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    rows = best_fit(lengths, max(lengths)) if room is None else pack(lengths, room)
    longest = max(sum(lengths[member] for member in row) for row in rows)
    fills = {
        "input_ids": pad,
        "labels": IGNORE,
        "attention_mask": 0,
        "position_ids": 0,
        "segment_ids": 0,
    }
    batch = {
        name: torch.full((len(rows), longest), fill, dtype=torch.int64)
        for name, fill in fills.items()
    }
    batch["document_ids"] = torch.full((len(rows), longest), -1, dtype=torch.int64)
    batch["answer_mask"] = torch.zeros((len(rows), longest), dtype=torch.bool)
    for b, members in enumerate(rows):
        start = 0
        for document, sequence in enumerate(sequences[member] for member in members):
            place = (b, slice(start, start + len(sequence.ids)))
            batch["input_ids"][place] = torch.from_numpy(sequence.ids)
            batch["labels"][place] = torch.from_numpy(sequence.labels)
            batch["answer_mask"][place] = torch.from_numpy(sequence.answers)
            batch["position_ids"][place] = torch.from_numpy(sequence.positions)
            batch["segment_ids"][place] = torch.from_numpy(sequence.segments)
            batch["attention_mask"][place] = 1
            batch["document_ids"][place] = document
            start += len(sequence.ids)
    codes = [
        found
        for members in rows
        for member in members
        if (found := sequences[member].codes) is not None
    ]
    if codes:
        batch["codes"] = torch.from_numpy(np.concatenate(codes))
    if len(rows) == len(sequences) and not batch["segment_ids"].any():
        for name in ("position_ids", "document_ids", "segment_ids"):
            del batch[name]
    return batch


def _where(row: Row) -> str:
    return f"The token row of image {row['image_id']}" if row.get("image_id") else "A token row"
