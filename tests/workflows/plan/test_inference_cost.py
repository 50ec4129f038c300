"""Memory of stages that train nothing, against a traced pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from smalti.schema import FeaturesSection
from smalti.tokenizers.encoders import VisionEncoder
from smalti.workflows.plan.base import Rates, gpu_rates
from smalti.workflows.plan.inference_cost import InferenceCost
from smalti.workflows.plan.trace import trace


def test_memory_of_stages_that_train_nothing() -> None:
    """Five images by the figures of one and two, against a pass of five; what does not fit names
    the largest batch.
    """
    section = FeaturesSection(batch_size=5)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    encoder = VisionEncoder(
        SiglipVisionModel(SiglipVisionConfig(**size, image_size=32, patch_size=8))
    )
    weights = 4 * sum(t.numel() for t in (*encoder.parameters(), *encoder.buffers()))
    modules = nn.ModuleDict({"encoder": encoder})
    look = InferenceCost.of(section, modules, [encoder], [encoder], 32)

    def step(backward: Any, autocast: Any) -> None:
        with torch.no_grad():
            encoder(torch.empty(5, 3, 32, 32))

    assert look.memory == pytest.approx(weights + trace(modules, step, bf16=False).peak)
    box = Rates(
        "box",
        1e12,
        1e9,
        (weights + look.first + 2.5 * look.further) / 0.92,
        "stated",
        {"fp32": 1e12},
    )
    assert (look.refusal("features", box) or "").endswith("Set features.batch_size=3.")
    assert look.refusal("features", gpu_rates("a100")) is None
