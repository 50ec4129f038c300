"""Rates of devices, and where they come from."""

from __future__ import annotations

import pytest

from smalti.errors import ConfigError
from smalti.workflows.plan.base import cpu_rates, gpu_rates


def test_rates_say_where_they_come_from() -> None:
    assert "ASSUMED" in gpu_rates("h100").origin
    assert gpu_rates("h100").flops == pytest.approx(0.45 * 67e12), "float32"
    with pytest.raises(
        ConfigError, match="--gpu h1000 is not known; there are a100, h100, h200, v100 and cpu"
    ):
        gpu_rates("h1000")
    measured = cpu_rates(64)
    assert measured.origin.startswith("measured")
    assert measured.flops > 1e8
    assert measured.read > 1e6


def test_a_gpu_without_bf16_is_planned_at_its_float32_rate() -> None:
    assert gpu_rates("v100").training("bf16") == gpu_rates("v100").training("fp32")
    assert gpu_rates("h100").training("bf16") > 10 * gpu_rates("h100").training("fp32")
    assert "CUDA 13" in gpu_rates("V100").note and not gpu_rates("A100").note
