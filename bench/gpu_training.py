"""H100: training a model of about 1.5B parameters on packed sequences of 4,096 tokens, by a bare
loop.

Goal: 42 % MFU or more; model FLOPs a token are 6 · (parameters but the embedding) + 12 · layers ·
length · width. Beside it the same with the attention that no mask hides alone, (document + 1) / 2
positions a token in place of the length. The step is that of the stage `mllm` (the model's loss,
the recipe's optimizer, bf16 autocast over float32 weights, no DeepSpeed and no Ray). Sequences lie
side by side in a row as `mllm.packing` lays them, each with positions of its own; here all are of
one length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import gpu
from bench.language_models import unified
from smalti.workflows.train.optimizers import build_optimizer

# as a recipe has it by itself
ADAMW: Any = SimpleNamespace(optimizer="adamw", weight_decay=0.0, betas=(0.9, 0.95))
GOALS = {"MFU": (">=", 0.42)}
DOCUMENT = 300  # tokens: a caption and an image of 256 codes


def packed(batch: int, length: int, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """A full batch of documents side by side, each attending to itself alone: the keys of
    `UnifiedModel.forward`.
    """
    ids_BL = torch.randint(vocabulary, (batch, length), device=device)
    document = min(DOCUMENT, length // 2)
    documents_L, positions_L = (
        torch.arange(length, device=device) // document,
        torch.arange(length, device=device) % document,
    )
    return {
        "input_ids": ids_BL,
        "labels": ids_BL.clone(),
        "attention_mask": torch.ones_like(ids_BL),
        "document_ids": documents_L.expand(batch, length),
        "segment_ids": torch.zeros_like(ids_BL),
        "position_ids": positions_L.expand(batch, length),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    asked = gpu.arguments(__doc__, argv)
    batch, length, codes = (2, 32, 64) if asked.tiny else (2, 4096, 16_384)
    name = None if asked.tiny else "Qwen/Qwen2.5-1.5B"
    model = unified(name, codes, asked.device, torch.float32).train()
    model.loss_chunk = 4096
    optimizer = build_optimizer(model, ADAMW, 1e-5, asked.device)
    inputs = packed(batch, length, model.vocabulary.size, asked.device)

    def step() -> None:
        with torch.autocast(asked.device.type, torch.bfloat16):
            loss, _ = model(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    took = gpu.seconds(step, asked.device, asked.turns)
    config, tokens = model.lm.config, batch * length
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.lm.get_input_embeddings().weight.numel()
    dense, attention = (
        6.0 * (parameters - embedding),
        12.0 * config.num_hidden_layers * config.hidden_size,
    )
    flops, useful = (
        dense + attention * length,
        dense + attention * (min(DOCUMENT, length // 2) + 1) / 2,
    )
    rows = [
        ("parameters", parameters / 1e9, "1e9"),
        ("seconds a step", took, "s"),
        ("tokens a second", tokens / took, "1/s"),
        ("MFU", gpu.peak_share(flops * tokens / took, asked.device), ""),
        ("MFU without what masks hide", gpu.peak_share(useful * tokens / took, asked.device), ""),
        (
            "memory of a step beyond weights and moments",
            gpu.extra_bytes(step, asked.device) / 1e9,
            "GB",
        ),
    ]
    gpu.report("gpu_training: packed training of 1.5B", rows, GOALS, asked)


if __name__ == "__main__":
    main()
