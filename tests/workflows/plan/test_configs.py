"""Sizes of public models, against their model cards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smalti.workflows.plan.configs import language_config, vision_config


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen/Qwen2.5-0.5B", 0.494), ("Qwen/Qwen2.5-7B-Instruct", 7.616)]
)
def test_sizes_of_public_language_models(name: str, billions: float) -> None:
    """Their model cards say 0.49B and 7.61B; the tests run without the hub, so the table speaks."""
    from transformers import AutoModelForCausalLM

    config, tokens, origin = language_config(name)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert tokens == 151_665
    assert "table of public models" in origin


def test_sizes_of_public_encoders() -> None:
    config, origin = vision_config("google/siglip-so400m-patch14-384")
    assert (
        config.hidden_size,
        config.image_size // config.patch_size,
        config.num_hidden_layers,
    ) == (1152, 27, 27)
    assert "table of public models" in origin
    with pytest.raises(
        Exception, match=r"encoder\.pretrained=acme/none: its config cannot be read from the hub"
    ):
        vision_config("acme/none")
