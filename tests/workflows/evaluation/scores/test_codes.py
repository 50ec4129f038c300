"""Code scores: usage, perplexity, entropy and VRR of known codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from smalti.schema import DualStage, VitSize
from smalti.tokenizers.dualtoken import DualModel, DualToken
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.metrics import code_counts
from smalti.workflows.evaluation.scores.codes import count_scores, histogram, levels_of
from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.models import Models
from tests.workflows.evaluation.planted_world import TOKENS, take


def test_codes_are_counted_over_all_held_out_tokens(planted: tuple[HeldOut, Models]) -> None:
    result = take("codes", planted)
    share = np.array([12, 4 / 3, 4 / 3, 4 / 3]) / 16
    entropy = -(share * np.log(share)).sum()
    assert result.scores["codes/usage"].value == 1.0
    assert result.scores["codes/usage"].n == 45 * TOKENS
    assert result.scores["codes/entropy"].value == pytest.approx(entropy)
    assert result.scores["codes/semantic_perplexity"].value == pytest.approx(math.exp(entropy))
    vrr = result.scores["codes/vrr"]
    assert vrr.value == pytest.approx(1.0)  # all patches of a colour are alike
    assert abs(vrr.baseline["shuffled"]) < 0.3
    assert result.tables["gallery_of"] == "semantic"
    assert sorted(line["code"] for line in result.tables["gallery"]) == [0, 1, 2, 3]


def test_code_scores_of_known_counts() -> None:
    scores = count_scores("", np.array([10, 10, 10, 10, 0, 0, 0, 0]))
    assert scores["codes/usage"].value == 0.5
    assert scores["codes/usage"].n == 40
    assert scores["codes/perplexity"].value == pytest.approx(4.0)
    assert scores["codes/entropy"].value == pytest.approx(math.log(4))
    one = count_scores("semantic_", np.array([7, 0]))
    assert one["codes/semantic_perplexity"].value == pytest.approx(1.0)


def test_codes_of_several_depths_are_counted_together_and_patches_go_by_the_first() -> None:
    tower = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    stage = DualStage(
        codes=5,
        depth=3,
        pixel_layers=[1],
        pixel_weights=[1.0],
        decoder=VitSize(dim=8, layers=1, heads=1),
    )
    tokenizer = DualToken(DualModel(stage, VisionEncoder(SiglipVisionModel(tower), -2)))
    codes = np.random.default_rng(0).integers(0, 5, (2, 4, 2, 3), dtype=np.int32)
    found = levels_of(tokenizer, codes)
    assert list(found) == ["", "semantic_"]
    for book, (first, every, num_codes) in enumerate(found.values()):
        assert first.tolist() == codes[:, :, book, 0].tolist() and num_codes == 5
        counts = code_counts(torch.from_numpy(every), num_codes)
        assert counts.tolist() == [int((codes[:, :, book] == k).sum()) for k in range(5)]


def test_histogram_is_sorted_and_thinned() -> None:
    counts = np.random.default_rng(0).permutation(np.arange(5000))
    found = histogram(counts)
    assert found["codes"] == 5000
    assert found["used"] == 4999
    assert found["tokens"] == counts.sum()
    assert found["points"][0] == [1, 4999]
    assert found["points"][-1] == [5000, 0]
    assert len(found["points"]) <= 256
