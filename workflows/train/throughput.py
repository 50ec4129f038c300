"""How fast a training runs, and where its time goes."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor, nn

from smalti.workflows.cluster.gpu_specs import bf16_peak
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.deepspeed_compat import full_numel, full_shape


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s.

    None for a CPU and for devices that `smalti.workflows.cluster.gpu_specs` does not list.
    """
    if device.type != "cuda":
        return None
    return bf16_peak(torch.cuda.get_device_name(device))


def flops_a_token(
    module: nn.Module, *, without: nn.Module | None = None, backward: bool = True
) -> float:
    """Model FLOPs per token through the matrices of a module.

    Per weight: 2 forward, with `backward` 2 more, and 2 more if it is trained. Attention's products
    of tokens with tokens are left out.

    Args:
        module: the model.
        without: a module in it whose matrices do not count.
        backward: whether gradients are computed.
    """
    skipped = set() if without is None else {id(p) for p in without.parameters()}
    total = 0.0
    for p in module.parameters():
        if len(full_shape(p)) > 1 and id(p) not in skipped:
            total += full_numel(p) * (2.0 + (2.0 + 2.0 * p.requires_grad) * backward)
    return total


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, in GB: of the device if it is a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e9 if sys.platform == "darwin" else most * 1024 / 1e9


class Throughput:
    """Rates since the last `take`.

    Samples per second, the task's own unit per second, MFU, the share of time that the loop waited
    for data, and peak memory. Counts are sums over the workers, the wait is their mean, the memory
    their maximum.

    Args:
        device: of this worker.
        batch_size: samples per step, over all workers.
        flops_per_unit: as `Task.flops_per_unit`.
        peak: FLOP/s of the device; default that of `peak_flops`.
    """

    def __init__(
        self,
        device: torch.device,
        batch_size: int,
        flops_per_unit: float | None,
        peak: float | None = None,
    ) -> None:
        self.device = device
        self.batch_size = batch_size
        self.flops = flops_per_unit
        self.peak = peak or peak_flops(device)
        self._start()

    def _start(self) -> None:
        self.began = time.monotonic()
        self.steps = 0
        self.wait_s = 0.0
        self.amounts: dict[str, float] = {}

    def step(self, wait_s: float, amounts: list[tuple[str, float] | None]) -> None:
        """Count a step: seconds waited for its data, and the amounts in its micro batches."""
        self.steps += 1
        self.wait_s += wait_s
        for amount in amounts:
            if amount is not None:
                self.amounts[amount[0]] = self.amounts.get(amount[0], 0.0) + amount[1]

    def take(self, collectives: Collectives) -> dict[str, float]:
        """The numbers since the last call; every worker calls it at the same step."""
        elapsed_s = max(time.monotonic() - self.began, 1e-9)
        names = sorted(self.amounts)
        own = [
            self.wait_s / elapsed_s,
            peak_memory_gb(self.device),
            *(self.amounts[name] for name in names),
        ]
        row: Tensor = torch.tensor([own], dtype=torch.float64, device=self.device)
        all_WN = collectives.all_gather(row)
        samples_per_s = self.steps * self.batch_size / elapsed_s
        numbers = {
            "samples_per_s": samples_per_s,
            "data_wait": float(all_WN[:, 0].mean()),
            "memory_gb": float(all_WN[:, 1].max()),
        }
        totals = all_WN.sum(0)[2:].tolist()
        numbers |= {
            f"{name}_per_s": total / elapsed_s for name, total in zip(names, totals, strict=True)
        }
        if self.flops and self.peak:
            units_per_s = totals[0] / elapsed_s if totals else samples_per_s
            numbers["mfu"] = units_per_s * self.flops / (self.peak * collectives.world_size)
        self._start()
        return numbers
