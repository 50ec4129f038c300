"""Goal 7: cross entropy over 65,536 and 348,672 classes, forward and backward, against torch's on
full logits.

512 positions of width 256, float32; ours in chunks of 64. One thread, in turns; the medians of
CPU-seconds count. Extra peak is what resident memory rises by beyond the gradients of weight and
hidden, which both sides must make, in a process of its own. Quality: 1 when losses and gradients
agree to 1e-5 of their size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import machine
from bench.turns import in_turns, peak_bytes
from smalti.mllm.losses import chunked_cross_entropy

NUM, DIM, CLASSES, CHUNK, TURNS, GOAL_MEMORY, GOAL_TIME = (
    512,
    256,
    (65_536, 348_672),
    64,
    2,
    1 / 8,
    1.1,
)


class Problem:
    """Hidden vectors, a head and labels of V classes, and the two ways to loss and gradients."""

    def __init__(self, num_classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden_ND = torch.randn(NUM, DIM, generator=generator).requires_grad_()
        self.weight_VD = (
            torch.randn(num_classes, DIM, generator=generator) / DIM**0.5
        ).requires_grad_()
        self.labels_N = torch.randint(num_classes, (NUM,), generator=generator)

    def ours(self) -> tuple[Tensor, ...]:
        total = (
            chunked_cross_entropy(self.hidden_ND, self.weight_VD, self.labels_N, CHUNK).total / NUM
        )
        return total.detach(), *torch.autograd.grad(total, (self.hidden_ND, self.weight_VD))

    def theirs(self) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(self.hidden_ND @ self.weight_VD.T, self.labels_N)
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden_ND, self.weight_VD))

    @property
    def gradient_bytes(self) -> int:
        return 4 * (self.hidden_ND.numel() + self.weight_VD.numel())


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) for a, b in pairs)


def main() -> None:
    torch.set_num_threads(1)
    Problem(64).ours(), Problem(64).theirs()  # what is loaded once is no scratch
    memory, times, same = {}, {}, True
    for num_classes in CLASSES:
        problem = Problem(num_classes)
        extra = [
            peak_bytes(side) - problem.gradient_bytes for side in (problem.ours, problem.theirs)
        ]
        same &= close(problem.ours(), problem.theirs())
        ours_s, theirs_s = in_turns(problem.ours, problem.theirs, TURNS, warm=True)
        memory[num_classes], times[num_classes] = (
            round(extra[0] / extra[1], 4),
            round(ours_s / theirs_s, 3),
        )
        print(
            f"{num_classes:,} classes: ours {ours_s:.2f} s, {extra[0] >> 20} MiB extra; "
            f"full logits {theirs_s:.2f} s, {extra[1] >> 20} MiB"
        )
    worst_memory, worst_time = max(memory.values()), max(times.values())
    result = {
        "goal": 7,
        "ratio": worst_time,
        "times": times,
        "memory": memory,
        "quality": float(same),
        "met": bool(same and worst_memory <= GOAL_MEMORY and worst_time <= GOAL_TIME),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
