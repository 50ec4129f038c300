"""Offload settings."""

from __future__ import annotations

import pytest
import torch

from smalti.errors import ConfigError
from smalti.schema import (
    Train,
)
from smalti.workflows.train.engines import deepspeed_config


def test_memory_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="zero_stage is 0"):
        Train(offload="cpu")
    with pytest.raises(ValueError, match="offload_path"):
        Train(offload="nvme", zero_stage=3)
    train = Train(offload="nvme", zero_stage=3, offload_path="/nvme")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"train\.offload=nvme: no CUDA device"):
            deepspeed_config(train, 1)
    found = deepspeed_config(Train(offload="cpu", zero_stage=3), 1)["zero_optimization"]
    assert found["offload_optimizer"]["device"] == found["offload_param"]["device"] == "cpu"
    assert (
        "offload_param"
        not in deepspeed_config(Train(offload="cpu", zero_stage=2), 1)["zero_optimization"]
    )
