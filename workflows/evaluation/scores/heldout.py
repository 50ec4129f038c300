"""Seeded samples of the held-out split, with codes, texts and pixels.

Samples are drawn from at most `MOST_SHARDS` shards, chosen evenly over the split, so that an
evaluation of fifty million images reads as little as one of a few thousand. The same seed gives the
same rows on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np
import pyarrow as pa

from smalti import shards
from smalti.errors import DataError
from smalti.images import to_pixels
from smalti.mllm.prompts import clean
from smalti.progress import Progress
from smalti.schema import EvaluateSection

MOST_SHARDS = 32
TEXT_COLUMNS = ["image_id", "caption", "label", "qa"]


@dataclass(frozen=True)
class EvaluationJob:
    """Inputs of an evaluation, as plain values that pickle."""

    path: str  # of the evaluation's artifact
    corpus: str
    tokens: str
    tokenizer: str
    encoder: str  # what VisionEncoder.from_pretrained takes
    encoder_layer: int
    export: str | None  # no language model: no questions, no drawings
    image_size: int
    max_pixels: int
    seed: int
    evaluate: EvaluateSection
    device: str = "cpu"
    own_encoder: bool = True  # trained in this chain, on the corpus's texts


@dataclass(frozen=True)
class HeldOutRow:
    """One held-out image: its position, codes int32 (T,) or (T, 2, R), and texts."""

    image_id: str
    key: str  # of the shard
    index: int  # in the shard
    codes: np.ndarray
    caption: str | None
    label: str | None
    qa: list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    """One held-out question, and the row of its image."""

    row: HeldOutRow
    question: str
    answer: str


def spread(keys: Sequence[str], most: int = MOST_SHARDS) -> list[str]:
    """At most `most` of the keys, evenly over the list, in order."""
    if len(keys) <= most:
        return list(keys)
    return [keys[int(place)] for place in np.linspace(0, len(keys) - 1, most).round()]


def choose(total: int, most: int, seed: int) -> np.ndarray:
    """At most `most` of the numbers 0 … total − 1, in ascending order.

    Drawn without replacement; the same seed gives the same numbers.
    """
    if total <= most:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, size=most, replace=False))


class Texts(TypedDict):
    """The texts of an image."""

    image_id: str
    caption: str | None
    label: str | None
    qa: list[dict[str, str]]


class TrainingTexts(Texts):
    """The texts of a training image, and its shard."""

    key: str


def texts_of(table: pa.Table) -> list[Texts]:
    """Texts of each row.

    A missing qa list becomes empty, an empty text None.
    """
    rows = table.select(TEXT_COLUMNS).to_pylist()
    for row in rows:
        row["qa"] = row["qa"] or []
        row["caption"] = row["caption"] or None
        row["label"] = row["label"] or None
    return rows


class HeldOut:
    """The held-out rows of a job, and its training split."""

    def __init__(self, job: EvaluationJob) -> None:
        self.job = job

    @cached_property
    def rows(self) -> list[HeldOutRow]:
        """Every row of the chosen held-out token shards, in the order of the shards.

        Raises:
            DataError: if there is none.
        """
        keys = spread(shards.list_shards(self.job.tokens, "val"))
        rows = [row for key in keys for row in self._rows_of(key)]
        if not rows:
            raise DataError(
                f"{self.job.tokens} holds no row of the split `val`, so there is nothing to "
                "measure on. Raise corpus.val_fraction, or set corpus.val_source, and run the "
                "chain again."
            )
        return rows

    def _rows_of(self, key: str) -> list[HeldOutRow]:
        table = shards.read_shard(self.job.tokens, key)
        codes = shards.codes(table)
        return [
            HeldOutRow(
                text["image_id"],
                key,
                index,
                codes[index],
                text["caption"],
                text["label"],
                text["qa"],
            )
            for index, text in enumerate(texts_of(table))
        ]

    @cached_property
    def images(self) -> list[HeldOutRow]:
        """The sample of held-out images, at most `evaluate.images`."""
        chosen = choose(len(self.rows), self.job.evaluate.images, self.job.seed)
        return [self.rows[index] for index in chosen]

    @cached_property
    def questions(self) -> list[Question]:
        """The sample of held-out questions, at most `evaluate.questions`."""
        everything = [
            Question(row, pair["question"], pair["answer"]) for row in self.rows for pair in row.qa
        ]
        chosen = choose(len(everything), self.job.evaluate.questions, self.job.seed + 1)
        return [everything[index] for index in chosen]

    def pixels(self, rows: Sequence[HeldOutRow]) -> np.ndarray:
        """The images of the rows: uint8 (B, size, size, 3).

        Raises:
            DataError: if the corpus lacks the image of a row.
        """
        size = self.job.image_size
        out = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        for key in sorted({row.key for row in rows}):
            places = [place for place, row in enumerate(rows) if row.key == key]
            table = shards.read_shard(self.job.corpus, key, columns=["image_id", "image"])
            by_id = {
                image_id: index for index, image_id in enumerate(table["image_id"].to_pylist())
            }
            for place in places:
                index = by_id.get(rows[place].image_id)
                if index is None:
                    raise DataError(
                        f"{self.job.tokens} has image {rows[place].image_id} in shard {key}, but "
                        f"{self.job.corpus} lacks it: the tokens are of another corpus. Remove "
                        f"{self.job.tokens} and run the stage `tokens` again."
                    )
                out[place] = to_pixels(
                    table["image"][index].as_py(), size, max_pixels=self.job.max_pixels
                )
        return out

    def batches(
        self, rows: Sequence[HeldOutRow], what: str
    ) -> Iterator[tuple[list[HeldOutRow], np.ndarray]]:
        """Yield the rows in batches of `evaluate.batch_size`, with their pixels.

        Rows are in the order of shards, so that each shard is read once.

        Args:
            what: label of the progress bar.
        """
        size = self.job.evaluate.batch_size
        with Progress(len(rows), "images", f"evaluate: {what}") as progress:
            for key in dict.fromkeys(row.key for row in rows):
                inside = [row for row in rows if row.key == key]
                pixels = self.pixels(inside)
                for start in range(0, len(inside), size):
                    batch = inside[start : start + size]
                    yield batch, pixels[start : start + size]
                    progress.update(len(batch))

    @cached_property
    def training_texts(self) -> list[TrainingTexts]:
        """Texts of the training rows.

        At most `MOST_SHARDS` · 8 token shards are read.
        """
        keys = spread(shards.list_shards(self.job.tokens, "train"), 8 * MOST_SHARDS)
        return [
            {"key": key, **text}
            for key in keys
            for text in texts_of(shards.read_shard(self.job.tokens, key, columns=TEXT_COLUMNS))
        ]

    @cached_property
    def labels(self) -> list[str]:
        """The sorted labels of the training split; empty if there are fewer than two."""
        seen = sorted({text["label"] for text in self.training_texts if text["label"]})
        return seen if len(seen) > 1 else []

    @cached_property
    def captions_of_labels(self) -> dict[str, str]:
        """A sentence for each label.

        Its most frequent training caption, if that covers at least half of the label's captioned
        rows (generated captions); otherwise `a photo of a <label>` (captions by people). A label
        without captions is its own sentence, as in training.
        """
        counts: dict[str, Counter[str]] = {label: Counter() for label in self.labels}
        for text in self.training_texts:
            if text["label"] in counts and text["caption"]:
                counts[text["label"]][text["caption"]] += 1
        return {
            label: _sentence(label, counter) if counter else clean(label)
            for label, counter in counts.items()
        }

    @cached_property
    def zero_shot_sentences(self) -> dict[str, str]:
        """A sentence for each label, for the encoder.

        For an encoder that was not trained here, a label without captions becomes `a photo of a
        <label>`.
        """
        if self.job.own_encoder:
            return self.captions_of_labels
        return {
            k: _photo(k) if text == clean(k) else text
            for k, text in self.captions_of_labels.items()
        }

    def labelled_training_pixels(self, most: int, size: int) -> tuple[np.ndarray, list[str]]:
        """A seeded sample of labelled training images.

        Returns:
            uint8 (n, size, size, 3), and their labels.
        """
        known = [text for text in self.training_texts if text["label"] in set(self.labels)]
        chosen = [known[index] for index in choose(len(known), most, self.job.seed + 2)]
        pixels = []
        labels = []
        for key in dict.fromkeys(text["key"] for text in chosen):
            table = shards.read_shard(self.job.corpus, key, columns=["image_id", "image"])
            by_id = {
                image_id: index for index, image_id in enumerate(table["image_id"].to_pylist())
            }
            for text in (text for text in chosen if text["key"] == key):
                data = table["image"][by_id[text["image_id"]]].as_py()
                pixels.append(to_pixels(data, size, max_pixels=self.job.max_pixels))
                labels.append(text["label"])
        return np.stack(pixels), labels


def _sentence(label: str, captions: Counter[str]) -> str:
    caption = min(captions, key=lambda text: (-captions[text], text))
    return caption if captions[caption] * 2 >= captions.total() else _photo(label)


def _photo(label: str) -> str:
    return f"a photo of a {label.replace('_', ' ')}"
