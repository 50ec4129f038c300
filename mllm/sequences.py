"""Build training sequences and batches from rows of token shards and text.

The formats are described in `smalti.mllm.prompts`.

Axes: B rows of a batch, T codes of an image, L length of a sequence or a row, N visual places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smalti.errors import ConfigError, VocabularyError
from smalti.mllm.losses import IGNORE
from smalti.mllm.packing import best_fit, pack, width_of
from smalti.mllm.prompts import TextEncoder, clean
from smalti.mllm.token_sequence import KINDS, Kind, SequenceParts, TokenSequence
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import Mixture

Row = Mapping[str, Any]
"""A row of a token shard (`codes`, `caption`, `label`, `qa`) or of a text shard (`text`)."""


class SequenceSettings(TypedDict, total=False):
    """Optional arguments of a `SequenceBuilder`."""

    mixture: Mixture
    uncond_probability: float
    questions_per_image: int
    max_length: int
    dense: bool
    dense_images: bool
    isolate_questions: bool


class SequenceBuilder:
    """Builds the sequences of one model; see `smalti.mllm.prompts` for the formats.

    Args:
        hf_tokenizer: the model's tokenizer, extended by `VisualVocabulary.extend`.
        vocabulary: layout of the flat vocabulary.
        mixture: weights of the kinds of sequences.
        uncond_probability: share of the drawn images that get no caption.
        questions_per_image: most questions of one sequence.
        max_length: most tokens of a sequence.
        dense: predict every token (captions, questions and codes included), which is what teaches
            a small model to use the image. Otherwise only the target: the image of a caption, the
            caption of an image, the answers.
        dense_images: in a dense sequence, also predict the codes of an image to be understood.
        isolate_questions: the questions of one sequence see the image and themselves, never each
            other (an earlier answer would give the next one away), so that each is trained as it is
            used: alone.

    Raises:
        ConfigError: if every weight of the mixture is 0.
    """

    def __init__(
        self,
        hf_tokenizer: PreTrainedTokenizerBase,
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
        self.dense = dense
        self.dense_images = dense_images
        self.isolate_questions = isolate_questions
        if not any(getattr(mixture, kind) for kind in KINDS):
            raise ConfigError(
                "Every weight of mllm.mixture is 0, so there is nothing to train on. Set one above "
                "0."
            )

    def kinds_for(self, row: Row) -> tuple[Kind, ...]:
        """The kinds of sequences that a row can become.

        An image without a caption can be drawn unconditionally.
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
        """Draw one of the row's kinds by the weights of the mixture.

        Args:
            row: a row of a token or text shard.
            rng: source of the draw.
            mixture: default: the builder's.

        Returns:
            The kind, or None if all of the row's kinds have weight 0.
        """
        mixture = mixture or self.mixture
        kinds = [kind for kind in self.kinds_for(row) if getattr(mixture, kind) > 0]
        if not kinds:
            return None
        weights = np.array([getattr(mixture, kind) for kind in kinds])
        drawn = rng.random() * weights.sum()
        return kinds[int(np.searchsorted(np.cumsum(weights), drawn, side="right"))]

    def build(self, kind: Kind, row: Row, rng: np.random.Generator) -> TokenSequence:
        """Build the sequence of a row.

        Text that does not fit `max_length` is cut; images are never cut. The same row and state of
        `rng` give the same sequence.

        Raises:
            ConfigError: if the image does not fit.
            VocabularyError: if a code is outside the vocabulary, or the row has no codes.
        """
        if kind == "text":
            return self._text(row)
        image = self._image(row)
        if kind == "caption_to_image":
            unconditional = rng.random() < self.uncond_probability
            return self._draw(image, "" if unconditional else caption_of(row))
        if kind == "image_to_caption":
            return self._describe(image, caption_of(row))
        return self._ask(image, questions_of(row), rng)

    def _text(self, row: Row) -> TokenSequence:
        parts = SequenceParts("text", self.max_length)
        parts.add(self.text.begin())
        parts.add_cut(self.text(clean(row.get("text"))), room=1)
        parts.add([self.vocabulary.eos])
        return parts.sequence()

    def _draw(self, image: list[int], caption: str) -> TokenSequence:
        vocabulary = self.vocabulary
        parts = SequenceParts("caption_to_image", self.max_length)
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
            question = self.text.question_prompt(questions[index][0])
            answer = self.text(questions[index][1])
            line_end = self.text.line_end
            length = len(question) + len(answer) + len(line_end)
            if nth > 0 and parts.length + length + 1 > self.max_length:
                parts.num_cut += length
                continue
            if self.isolate_questions:
                parts.begin_segment()
            parts.add_cut(question, room=length - len(question) + 1, predicted=self.dense)
            parts.add_cut(answer, room=len(line_end) + 1, answer=True)
            parts.add_cut(line_end, room=1)
        parts.add([self.vocabulary.eos])
        return parts.sequence()

    def _seen(self, kind: Kind, image: list[int]) -> SequenceParts:
        """A sequence that starts with an image to be understood."""
        parts = SequenceParts(kind, self.max_length)
        parts.add(self.text.begin(), predicted=self.dense)
        parts.add([self.vocabulary.und_start], predicted=self.dense)
        parts.add(image, predicted=self.dense and self.dense_images)
        parts.add([self.vocabulary.und_end], predicted=self.dense)
        return parts

    def _image(self, row: Row) -> list[int]:
        codes = np.asarray(row["codes"]).reshape(-1)
        if len(codes) and (int(codes.min()) < 0 or int(codes.max()) >= self.vocabulary.num_codes):
            self.vocabulary.check_codes(torch.from_numpy(codes.astype(np.int64)), source_of(row))
        if not len(codes):
            raise VocabularyError(f"{source_of(row)} holds no visual codes. Tokenize again.")
        needed = len(codes) + len(self.text.begin()) + 3
        if needed > self.max_length:
            raise ConfigError(
                f"mllm.max_length={self.max_length} cannot hold an image of {len(codes)} codes "
                "with its delimiters, and images are never cut. Set mllm.max_length to at least "
                f"{needed + 32} (with room for text)."
            )
        return (codes.astype(np.int64) + self.vocabulary.first_visual).tolist()


def caption_of(row: Row) -> str:
    """A row's caption, else its label, on one line; empty without either."""
    return clean(row.get("caption")) or clean(row.get("label"))


def questions_of(row: Row) -> list[tuple[str, str]]:
    """A row's (question, answer) pairs, without those that lack one of the two."""
    pairs = ((clean(pair["question"]), clean(pair["answer"])) for pair in row.get("qa") or ())
    return [(question, answer) for question, answer in pairs if question and answer]


def collate(
    sequences: Sequence[TokenSequence], pad: int, room: int | None = None
) -> dict[str, Tensor]:
    """A batch for `UnifiedModel`, padded on the right to (B, L).

    Short sequences share a row, so B may be below their number.

    Args:
        sequences: at least one.
        pad: padding token.
        room: intended width of a row (`pack`); None: the longest sequence (`best_fit`).

    Returns:
        `input_ids`, `labels` and `attention_mask`, int64; `answer_mask`, bool. If a row is shared
        or a sequence has segments, also `position_ids`, `document_ids` (−1 for padding) and
        `segment_ids`, int64; see `visible_mask`. If visual places hold several codes, also `codes`
        int64 (N, 2, R), of all places of the batch in reading order.
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    rows = best_fit(lengths, max(lengths)) if room is None else pack(lengths, room)
    batch = _empty_batch(len(rows), width_of(rows, lengths), pad)
    codes: list[np.ndarray] = []
    for b, members in enumerate(rows):
        start = 0
        for document, member in enumerate(members):
            sequence = sequences[member]
            _fill(batch, (b, slice(start, start + len(sequence.ids))), sequence, document)
            start += len(sequence.ids)
            if sequence.codes is not None:
                codes.append(sequence.codes)
    if codes:
        batch["codes"] = torch.from_numpy(np.concatenate(codes))
    if len(rows) == len(sequences) and not batch["segment_ids"].any():
        for name in ("position_ids", "document_ids", "segment_ids"):
            del batch[name]
    return batch


def _empty_batch(num_rows: int, width: int, pad: int) -> dict[str, Tensor]:
    fills = {
        "input_ids": pad,
        "labels": IGNORE,
        "attention_mask": 0,
        "position_ids": 0,
        "segment_ids": 0,
        "document_ids": -1,
    }
    shape = (num_rows, width)
    batch = {name: torch.full(shape, fill, dtype=torch.int64) for name, fill in fills.items()}
    batch["answer_mask"] = torch.zeros(shape, dtype=torch.bool)
    return batch


def _fill(
    batch: dict[str, Tensor], place: tuple[int, slice], sequence: TokenSequence, document: int
) -> None:
    """Write a sequence into its place (row, columns) of a batch."""
    batch["input_ids"][place] = torch.from_numpy(sequence.ids)
    batch["labels"][place] = torch.from_numpy(sequence.labels)
    batch["answer_mask"][place] = torch.from_numpy(sequence.answers)
    batch["position_ids"][place] = torch.from_numpy(sequence.positions)
    batch["segment_ids"][place] = torch.from_numpy(sequence.segments)
    batch["attention_mask"][place] = 1
    batch["document_ids"][place] = document


def source_of(row: Row) -> str:
    """The row as an error names it, at the start of a sentence."""
    return f"The token row of image {row['image_id']}" if row.get("image_id") else "A token row"
