"""Stages and learning rates of the language model's section."""

from __future__ import annotations

import pytest

from smalti.schema import (
    Mixture,
    MllmSection,
    MllmStage,
    PartRates,
    Train,
)


def test_stages_of_the_language_model_name_their_steps() -> None:
    mixture, train = Mixture(qa=3), Train(steps=10)
    section = MllmSection(
        answer_loss_weight=5,
        train=train,
        stages=[
            MllmStage(from_step=2, answer_loss_weight=0),
            MllmStage(from_step=6, mixture=mixture),
        ],
    )
    found = [section.stage_at(step) for step in (0, 1, 2, 5, 6, 9)]
    assert [stage.answer_loss_weight for stage in found] == [5, 5, 0, 0, 5, 5], (
        "what is not named is the section's"
    )
    assert [stage.mixture for stage in found] == [Mixture()] * 4 + [mixture] * 2
    assert section.whole_mixture == mixture
    for steps in ([6, 2], [2, 2], [10]):
        with pytest.raises(ValueError, match=r"rising steps below train\.steps=10"):
            MllmSection(train=train, stages=[MllmStage(from_step=step) for step in steps])


def test_rates_of_the_parts_follow_the_stages() -> None:
    section = MllmSection(
        lr=PartRates(adapter=50, backbone=0.5),
        freeze=["new_rows"],
        stages=[
            MllmStage(from_step=0, freeze=["backbone"]),
            MllmStage(from_step=4, freeze=[], lr=PartRates()),
            MllmStage(from_step=6, answer_loss_weight=2),
        ],
        train=Train(steps=10),
    )
    found = [section.rates_at(step) for step in (0, 3, 4, 6)]
    assert found == [
        {"new_rows": 0.0, "adapter": 50.0, "backbone": 0.0},
        {"new_rows": 0.0, "adapter": 50.0, "backbone": 0.0},
        {"new_rows": 0.0, "adapter": 1.0, "backbone": 1.0},
        {"new_rows": 0.0, "adapter": 50.0, "backbone": 0.5},
    ]
    assert section.has_part_rates
    assert not MllmSection(freeze=["backbone"]).has_part_rates and not MllmSection().has_part_rates
