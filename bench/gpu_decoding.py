"""H100: drawing 256 tokens with a model of 7B parameters and 196,608 codes, without and with
guidance.

Goals: 6.2 ms a step or less at batch 1; with guidance (both halves in one batch) 1.1 times that or
less. It draws through `smalti.mllm.generation.draw` with its compiled steps (CUDA graphs); the
plain steps are shown beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import gpu
from bench.language_models import unified
from smalti.mllm.generation import draw

GOALS = {"milliseconds a step": ("<=", 6.2), "with guidance / without": ("<=", 1.1)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    asked = gpu.arguments(__doc__, argv)
    tokens, codes = (4, 64) if asked.tiny else (256, 196_608)
    name = None if asked.tiny else "Qwen/Qwen2.5-7B-Instruct"
    model = unified(
        name, codes, asked.device, torch.float32 if asked.tiny else torch.bfloat16
    ).eval()
    prompt = [*range(20), model.vocabulary.boi]

    backend = None if asked.tiny else "inductor"

    def run(cfg: float, count: int, compile: str | None = backend) -> None:
        sampling: Any = SimpleNamespace(
            cfg=cfg, temperature=1.0, top_k=0 if asked.tiny else 2000, top_p=1.0
        )
        draw(
            model,
            model.vocabulary,
            [prompt] * count,
            tokens=tokens,
            sampling=sampling,
            seed=0,
            compile=compile,
        )

    plain = gpu.seconds(lambda: run(1.0, 1), asked.device, asked.turns, warm=1)
    guided = gpu.seconds(lambda: run(5.0, 1), asked.device, asked.turns, warm=1)
    eight = gpu.seconds(lambda: run(5.0, 8), asked.device, max(1, asked.turns // 3), warm=1)
    eager = gpu.seconds(lambda: run(1.0, 1, None), asked.device, asked.turns, warm=1)
    rows = [
        ("milliseconds a step, not compiled", eager / tokens * 1e3, "ms"),
        ("milliseconds a step", plain / tokens * 1e3, "ms"),
        ("milliseconds a step, with guidance", guided / tokens * 1e3, "ms"),
        ("with guidance / without", guided / plain, ""),
        ("images a minute, 8 at once with guidance", 8 * 60 / eight, "1/min"),
    ]
    gpu.report("gpu_decoding: drawing with 7B", rows, GOALS, asked)


if __name__ == "__main__":
    main()
