"""The planted world as held-out data and models, and one core for torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from smalti.schema import EvaluateSection
from smalti.workflows.evaluation import stage as evaluate
from smalti.workflows.evaluation.scores.heldout import EvaluationJob, HeldOut
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


@pytest.fixture(scope="module", autouse=True)
def _one_core() -> Iterator[None]:
    """Tests share the machine: one torch thread, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "cores", lambda: 1)
        yield


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeldOut, Models]:
    corpus, tokens = str(tmp_path_factory.mktemp("corpus")), str(tmp_path_factory.mktemp("tokens"))
    for split, found in (("train", TRAIN), ("val", VAL)):
        write_split(corpus, tokens, split, found, np.stack([item.codes for item in found]))
    job = EvaluationJob(
        path=str(tmp_path_factory.mktemp("evaluation")), corpus=corpus, tokens=tokens, tokenizer="", encoder="",
        encoder_layer=-1, export="here", image_size=SIZE, max_pixels=10**6, seed=0,
        evaluate=EvaluateSection(batch_size=8, drawings=2),
    )  # fmt: skip
    data = HeldOut(job)
    models = Models(data)
    vars(models).update(tokenizer=PaletteTokenizer(), language=Oracle(), encoder=ColorEncoder())
    return data, models
