"""Peaks of GPUs by the name that torch reports."""

from __future__ import annotations

from smalti.workflows.cluster.gpu_specs import bf16_peak


def test_cards_of_one_name_have_peaks_of_their_own() -> None:
    """Names as torch gives them."""
    names = (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200",
        "NVIDIA A100 80GB PCIe",
    )
    assert [bf16_peak(name) for name in names] == [989e12, 756e12, 835e12, 989e12, 312e12]
    assert bf16_peak("NVIDIA GeForce RTX 4090") is None
