"""H100: codes of vectors at K = 500,000 x 1152, as the code search of the codebook does it.

Goals: bf16 scores with exact rescoring at 45 % of the bf16 peak or more, with 1 GB of scratch at
most (the codes' bf16 copy is part of the index). With triton they come from
`smalti.tokenizers.nearest_kernel`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import gpu
from smalti.tokenizers.code_index import CodeIndex

GOALS = {"share of the bf16 peak": (">=", 0.45), "scratch, bf16": ("<=", 1.0)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    asked = gpu.arguments(__doc__, argv)
    num, codes, width = (256, 512, 32) if asked.tiny else (65_536, 500_000, 1152)
    generator = torch.Generator(asked.device).manual_seed(0)
    x_NC = torch.randn(num, width, generator=generator, device=asked.device)
    index = CodeIndex(torch.randn(codes, width, generator=generator, device=asked.device))
    flops = 2.0 * num * codes * width
    rows, found = [], {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[name] = index.exact(x_NC, dtype)[0]
        took = gpu.seconds(lambda dtype=dtype: index.exact(x_NC, dtype), asked.device, asked.turns)  # type: ignore[misc]
        scratch = gpu.extra_bytes(lambda dtype=dtype: index.exact(x_NC, dtype), asked.device)  # type: ignore[misc]
        rows += [
            (f"vectors a second, {name}", num / took, "1/s"),
            (f"arithmetic, {name}", flops / took / 1e12, "TFLOP/s"),
        ]
        rows.append((f"scratch, {name}", scratch / 1e9, "GB"))
        if name == "bf16":
            rows.append(("share of the bf16 peak", gpu.peak_share(flops / took, asked.device), ""))
    rows.append(
        ("same codes in bf16 and fp32", float((found["bf16"] == found["fp32"]).double().mean()), "")
    )
    gpu.report("gpu_assignment: code assignment", rows, GOALS, asked)


if __name__ == "__main__":
    main()
