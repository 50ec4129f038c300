"""H100: cross entropy over 348,672 tokens, hidden 3584, 8,192 positions: ours in chunks, torch's on whole logits, liger's.

Goals: ours at 1.3 times the speed of whole logits or more (forward and backward), within 1 GB beyond the gradients, which are in
bf16 here and summed so (`low_sums`); with float32 sums it is shown too. Where liger-kernel is installed ours takes its kernel, as
training does; then ours without it, and liger's own fused loss, are shown as well.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu
from smalti.mllm.losses import chunked_cross_entropy

GOALS = {"speed against whole logits": (">=", 1.3), "memory beyond the gradients, ours": ("<=", 1.0)}
CHUNK = 512  # recipes/semhitok-256.yaml


def losses(chunk: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Mean loss of (hidden, weight, labels) by name."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": lambda h, w, y: chunked_cross_entropy(h, w, y, chunk, low_sums=True).total / len(y),
        "ours, float32 sums": lambda h, w, y: chunked_cross_entropy(h, w, y, chunk).total / len(y),
        "whole logits": lambda h, w, y: F.cross_entropy((h @ w.T).float(), y),
    }
    if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["ours, without the kernel"] = lambda h, w, y: (
            chunked_cross_entropy(h, w, y, chunk, low_sums=True, kernel=False).total / len(y)
        )
        found["liger"] = lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    asked = gpu.arguments(__doc__, argv)
    num, width, vocabulary, chunk = (64, 32, 512, 16) if asked.tiny else (8192, 3584, 348_672, CHUNK)
    torch.manual_seed(0)
    dtype = torch.float32 if asked.tiny else torch.bfloat16
    hidden = torch.randn(num, width, device=asked.device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=asked.device, dtype=dtype) / width**0.5).requires_grad_()
    labels = torch.randint(vocabulary, (num,), device=asked.device)
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size() / 1e9
    rows, took, values = [], {}, {}
    for name, loss in losses(chunk).items():

        def call(loss: Callable[[Tensor, Tensor, Tensor], Tensor] = loss) -> Tensor:
            hidden.grad = weight.grad = None
            value = loss(hidden, weight, labels)
            value.backward()
            return value.detach()

        values[name] = float(call())
        took[name] = gpu.seconds(call, asked.device, asked.turns)
        hidden.grad = weight.grad = None
        beyond = gpu.extra_bytes(call, asked.device) / 1e9 - gradients
        rows += [(f"seconds, {name}", took[name], "s"), (f"memory beyond the gradients, {name}", beyond, "GB")]
    rows.append(("speed against whole logits", took["whole logits"] / took["ours"], ""))
    rows.append(("difference of the losses", abs(values["ours"] - values["whole logits"]), ""))
    gpu.report("gpu_cross_entropy: loss over 348,672 tokens", rows, GOALS, asked.tiny)


if __name__ == "__main__":
    main()
