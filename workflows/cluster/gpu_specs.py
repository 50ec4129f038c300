"""Figures of GPUs from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    `bf16`, `tf32`, `fp32`: peaks without sparsity in FLOP/s. `memory`: bytes as torch reports them.
    `inside`, `network`: bytes per second in each direction between the GPUs of a node, and of a
    node's network. `host`: bytes of main memory per GPU. `network` and `host` are those of the
    usual cloud machines. `note`: what to know before renting one.
    """

    bf16: float
    tf32: float
    fp32: float
    memory: float
    inside: float
    network: float
    host: float
    note: str = ""


VOLTA = (
    "torch of requirements.lock is built for CUDA 13, which does not run on Volta: install a "
    "build for CUDA 12.6 there"
)
GPUS = {  # SXM modules; machines p4de, p5, p5en, p3dn
    "a100": Gpu(312e12, 156e12, 19.5e12, 85.0e9, 300e9, 50e9, 144e9),
    "h100": Gpu(989e12, 495e12, 67e12, 85.0e9, 450e9, 400e9, 256e9),
    "h200": Gpu(989e12, 495e12, 67e12, 150.1e9, 450e9, 400e9, 256e9),
    # no bf16 units: float32's rate
    "v100": Gpu(15.7e12, 15.7e12, 15.7e12, 34.0e9, 150e9, 12.5e9, 96e9, VOLTA),
}
SLOWER = {"h100 pcie": 756e12, "h100 nvl": 835e12, "h200 nvl": 835e12}
"""bf16 peaks of cards that share a module's name."""


def bf16_peak(name: str) -> float | None:
    """FLOP/s of a device by torch's name for it; None if unknown."""
    peaks = SLOWER | {part: gpu.bf16 for part, gpu in GPUS.items()}
    return next((peak for part, peak in peaks.items() if part in name.lower()), None)
