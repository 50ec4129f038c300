"""Unified models of public sizes with random weights, for the GPU benchmarks: no file and no
network.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from smalti.mllm.adapters import DualAdapter
from smalti.mllm.language_model import fit_shapes
from smalti.mllm.model import UnifiedModel
from smalti.mllm.vocabulary import DELIMITERS, VisualVocabulary
from smalti.workflows.plan.configs import language_config

SPLITS = (48, 8)  # recipes/semhitok-256.yaml: widths of a semantic and a pixel code


def unified(
    name: str | None, num_codes: int, device: torch.device, dtype: torch.dtype
) -> UnifiedModel:
    """A public Qwen2.5 by name, None for a tiny one, with `num_codes` visual codes; normal weights,
    straight on the device.
    """
    if name is None:
        tokens = 300
        config: Any = Qwen2Config(
            vocab_size=tokens, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False,
        )  # fmt: skip
    else:
        config, tokens, _ = language_config(name)
    first = tokens + len(DELIMITERS)
    vocabulary = VisualVocabulary(
        tokens, first, num_codes, tokens, tokens + 1, tokens + 2, tokens + 3, 0, 0, None
    )
    with torch.device("meta"):
        lm: Any = AutoModelForCausalLM.from_config(config)
        fit_shapes(lm, vocabulary)
        width = lm.get_input_embeddings().embedding_dim
        model = UnifiedModel(
            lm, DualAdapter(SPLITS, width, width), torch.empty(num_codes, sum(SPLITS)), vocabulary
        )
    with torch.device(device):
        rotary = type(lm.model.rotary_emb)(config=lm.config)  # its buffers are computed, not loaded
    model = model.to_empty(device=device)
    lm.model.rotary_emb = rotary
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)
        model.code_vectors_VC.normal_(generator=generator)
        model.adapter.shift_C.zero_()
        model.adapter.whiten_CC.copy_(torch.eye(sum(SPLITS)))
    return model.to(dtype) if dtype != torch.float32 else model
