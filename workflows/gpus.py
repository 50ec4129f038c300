"""What is known of GPUs from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A data sheet: peaks without sparsity in FLOP/s, bytes, bytes a second each way between the GPUs of a node, and of a
    node's network (in the cloud machines that are rented with it)."""

    bf16: float
    tf32: float
    fp32: float
    memory: float
    inside: float
    network: float


GPUS = {
    "a100": Gpu(312e12, 156e12, 19.5e12, 80e9, 300e9, 50e9),
    "h100": Gpu(989e12, 495e12, 67e12, 80e9, 450e9, 400e9),
    "h200": Gpu(989e12, 495e12, 67e12, 141e9, 450e9, 400e9),
    "v100": Gpu(15.7e12, 15.7e12, 15.7e12, 32e9, 150e9, 12.5e9),  # no bf16 units: float32's rate
}
