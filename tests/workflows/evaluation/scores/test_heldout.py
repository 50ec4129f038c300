"""Held-out rows: samples, texts, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from smalti import shards
from smalti.errors import DataError
from smalti.schema import EvaluateSection
from smalti.workflows.evaluation import stage as evaluate
from smalti.workflows.evaluation.scores.drawing import prompts_of
from smalti.workflows.evaluation.scores.heldout import EvaluationJob, HeldOut, choose, spread
from smalti.workflows.evaluation.scores.models import Models
from tests.workflows.evaluation.planted_world import (
    SIZE,
    TRAIN,
    VAL,
    ColorEncoder,
    Oracle,
    PaletteTokenizer,
    write_split,
)


def test_samples_follow_the_settings(planted: tuple[HeldOut, Models]) -> None:
    few = dataclasses.replace(planted[0].job, evaluate=EvaluateSection(images=7, questions=5))
    data = HeldOut(few)
    assert len(data.images) == 7
    assert len(data.questions) == 5
    assert [row.image_id for row in HeldOut(few).images] == [row.image_id for row in data.images]


def test_without_labels_captions_and_questions_only_pixels_are_measured(tmp_path: Path) -> None:
    corpus, tokens = str(tmp_path / "corpus"), str(tmp_path / "tokens")
    write_split(corpus, tokens, "val", VAL, np.stack([item.codes for item in VAL]))
    for key in shards.list_shards(tokens, "val"):
        table = shards.read_shard(tokens, key)
        for name in ("caption", "label", "qa"):
            index = table.schema.get_field_index(name)
            table = table.set_column(
                index, table.schema.field(name), pa.nulls(len(table), table.schema.field(name).type)
            )
        shards.write_shard(tokens, key, table)
    job = EvaluationJob("", corpus, tokens, "", "", -1, "here", SIZE, 10**6, 0, EvaluateSection())
    data = HeldOut(job)
    models = Models(data)
    vars(models).update(tokenizer=PaletteTokenizer(), language=Oracle(), encoder=ColorEncoder())
    results = {name: measure.compute(data, models) for name, measure in evaluate.MEASURES.items()}
    assert {name for name, result in results.items() if result.skipped} == {
        "zero_shot",
        "retrieval",
        "questions",
        "drawing",
    }
    assert "reconstruction/psnr" in results["reconstruction"].scores


def test_nothing_held_out_is_an_error(tmp_path: Path) -> None:
    corpus, tokens = str(tmp_path / "corpus"), str(tmp_path / "tokens")
    write_split(corpus, tokens, "train", TRAIN, np.stack([item.codes for item in TRAIN]))
    job = EvaluationJob("", corpus, tokens, "", "", -1, None, SIZE, 10**6, 0, EvaluateSection())
    with pytest.raises(DataError, match="val_fraction"):
        _ = HeldOut(job).images


def test_tokens_of_another_corpus_are_refused(
    planted: tuple[HeldOut, Models], tmp_path: Path
) -> None:
    others = [dataclasses.replace(item, image_id=f"other-{item.image_id}") for item in VAL]
    write_split(
        str(tmp_path / "corpus"),
        str(tmp_path / "tokens"),
        "val",
        others,
        np.stack([i.codes for i in others]),
    )
    job = dataclasses.replace(planted[0].job, tokens=str(tmp_path / "tokens"))
    data = HeldOut(job)
    with pytest.raises(DataError, match="another corpus"):
        data.pixels(data.images)


def told_of(rows: list[tuple[str | None, str]], own_encoder: bool) -> HeldOut:
    """A job whose training split has these (caption, label) rows."""
    data = HeldOut(
        EvaluationJob(
            "", "", "", "", "", -1, None, 8, 1, 0, EvaluateSection(), own_encoder=own_encoder
        )
    )
    vars(data).update(
        training_texts=[{"caption": caption, "label": label} for caption, label in rows]
    )
    return data


def test_a_label_is_drawn_and_recognised_by_the_text_that_was_trained_with() -> None:
    rows = [
        ("red ball!", "red_ball"),
        (None, "cat"),
        ("Tom asleep", "dog"),
        ("a wet nose", "dog"),
        ("at home", "dog"),
    ]
    data = told_of([*rows, (None, "grey_mouse")], own_encoder=True)
    wanted = {
        "red_ball": "red ball!",
        "cat": "cat",
        "dog": "a photo of a dog",
        "grey_mouse": "grey_mouse",
    }
    assert data.captions_of_labels == data.zero_shot_sentences == wanted
    assert {prompt.label: prompt.text for prompt in prompts_of(data)} == wanted
    other = told_of([*rows, (None, "grey_mouse")], own_encoder=False)
    assert other.captions_of_labels == wanted
    photos = {"cat": "a photo of a cat", "grey_mouse": "a photo of a grey mouse"}
    assert other.zero_shot_sentences == wanted | photos


def test_samples_are_seeded_sorted_and_without_repeats() -> None:
    first = choose(1000, 50, seed=3)
    assert np.array_equal(first, choose(1000, 50, seed=3))
    assert not np.array_equal(first, choose(1000, 50, seed=4))
    assert len(set(first.tolist())) == 50
    assert (np.diff(first) > 0).all()
    assert choose(3, 50, seed=0).tolist() == [0, 1, 2]


def test_spread_keeps_order_and_ends() -> None:
    keys = [f"val/{i:05d}" for i in range(100)]
    some = spread(keys, 7)
    assert len(set(some)) == 7
    assert some == sorted(some)
    assert some[0] == keys[0]
    assert some[-1] == keys[-1]
    assert spread(keys[:3], 7) == keys[:3]
