"""The embedding swap: from a unified model with its adapter to a plain Hugging Face folder (arXiv
2503.06764, Algorithm 1).

The adapter's output for a code depends on that code alone, so it can be written into the code's
embedding row. The result loads with `AutoModelForCausalLM` and `AutoTokenizer` where this project
is not installed, and gives the same logits.
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

from smalti.errors import VocabularyError
from smalti.mllm.depth import DepthModel
from smalti.mllm.model import UnifiedModel
from smalti.mllm.prompts import UNCONDITIONAL
from smalti.mllm.visual_side import save_side, side_settings
from smalti.mllm.vocabulary import DELIMITERS, VisualVocabulary, visual_token
from smalti.tokenizers.encoders import quiet

FORMAT = 1
SETTINGS = "smalti.json"
VISUAL_TOKENIZER = "visual_tokenizer"
MAX_FILE = "4GB"
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    model: UnifiedModel,
    hf_tokenizer: Any,
    tokenizer_path: str,
    out_dir: str,
    dtype: Literal["fp32", "bf16"] = "fp32",
    *,
    chunk: int = 8192,
) -> dict[str, int]:
    """Write the plain model into the local folder `out_dir`; counts of parameters, embedding rows
    and codes come back.

    Beside the usual files: `smalti.json` (tokens an image, patch grid, where the visual ids begin,
    system) and `visual_tokenizer/`, a whole copy of the visual tokenizer at `tokenizer_path`, so
    that the folder can be moved alone. Of a `DepthModel` the plain part reads and writes text
    alone; `visual_heads.safetensors` holds what sees and draws. `chunk`: codes that pass the
    adapter at once. The unified model is left as it is.
    """
    from smalti.tokenizers.loading import load_tokenizer

    visual = load_tokenizer(tokenizer_path)
    if visual.num_codes != model.num_codes:
        raise VocabularyError(
            f"{tokenizer_path} has {visual.num_codes} codes, but this model was trained with {model.num_codes} "
            f"visual codes. Export it with the tokenizer that made its tokens."
        )
    os.makedirs(out_dir, exist_ok=True)
    counts = export_language_model(model, hf_tokenizer, out_dir, DTYPES[dtype], chunk)
    visual.save_pretrained(os.path.join(out_dir, VISUAL_TOKENIZER))
    settings = {
        "format": FORMAT,
        "system": _system(os.path.join(out_dir, VISUAL_TOKENIZER)),
        "tokens": visual.grid[0] * visual.grid[1],
        "grid": list(visual.grid),
        "image_size": visual.image_size,
        "first_visual": model.vocabulary.first_visual,
        "num_codes": model.vocabulary.num_codes,
        "first_visual_token": visual_token(0),
        "delimiters": list(DELIMITERS),
        "unconditional": UNCONDITIONAL,
        "visual_tokenizer": VISUAL_TOKENIZER,
    }
    if isinstance(model, DepthModel):
        counts |= {
            "parameters": counts["parameters"] + save_side(model, out_dir, DTYPES[dtype]),
            "codes": visual.num_codes,
        }
        settings |= {"code_shape": list(visual.code_shape), "visual_side": side_settings(model)}
    with open(os.path.join(out_dir, SETTINGS), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2)
    return counts


def export_language_model(
    model: UnifiedModel, hf_tokenizer: Any, out_dir: str, dtype: torch.dtype, chunk: int = 8192
) -> dict[str, int]:
    """The Hugging Face part of `export`: weights with every embedding row, configs, tokenizer and
    chat template.
    """
    lm = model.lm
    state = {
        name: tensor.to(dtype)
        for name, tensor in lm.state_dict().items()
        if tensor.is_floating_point()
    }
    state |= {
        name: tensor for name, tensor in lm.state_dict().items() if not tensor.is_floating_point()
    }
    embed = lm.get_input_embeddings()
    name = next(name for name, module in lm.named_modules() if module is embed)
    rows_VH = swapped_rows(model, dtype, chunk)
    state[f"{name}.weight"] = rows_VH
    with quiet():
        lm.save_pretrained(out_dir, state_dict=state, max_shard_size=MAX_FILE)
    _record_dtype(os.path.join(out_dir, "config.json"), dtype)
    hf_tokenizer.save_pretrained(out_dir)
    _check_tokenizer(model.vocabulary, hf_tokenizer, out_dir)
    return {
        "parameters": sum(p.numel() for p in lm.parameters())
        - embed.weight.numel()
        + rows_VH.numel(),
        "embedding_rows": len(rows_VH),
        "codes": model.vocabulary.num_codes,
    }


@torch.no_grad()
def swapped_rows(model: UnifiedModel, dtype: torch.dtype, chunk: int = 8192) -> Tensor:
    """The whole embedding matrix (V, H), V the head's rows: trained text rows, then the adapter's
    output for every code.

    Rows beyond the vocabulary (padding of the published model) are zero: no token has them.
    """
    embed, head = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()
    first = model.vocabulary.first_visual
    rows_VH = torch.zeros((head.out_features, embed.embedding_dim), dtype=dtype)
    rows_VH[:first] = embed.weight.to(dtype).cpu()
    for start in range(0, model.vocabulary.num_codes, chunk):
        vectors_nH = model.visual_rows(start, start + chunk)
        rows_VH[first + start : first + start + len(vectors_nH)] = vectors_nH.to(dtype).cpu()
    return rows_VH


_PROBE = "A blue circle, isn't it?\n 1234  Ünïcode <start_of_image><IMG_0>"


def _check_tokenizer(vocabulary: VisualVocabulary, hf_tokenizer: Any, out_dir: str) -> None:
    """Raise VocabularyError unless the written tokenizer loads as the one that the model was
    trained with.

    `AutoTokenizer` chooses a class by the model's type and may replace a custom tokenizer's
    normalisation or word split.
    """
    loaded = AutoTokenizer.from_pretrained(out_dir)
    same = loaded(_PROBE)["input_ids"] == hf_tokenizer(_PROBE)["input_ids"]
    if not same or VisualVocabulary.from_tokenizer(loaded) != vocabulary:
        raise VocabularyError(
            f"The exported tokenizer in {out_dir} loads as {type(loaded).__name__} and gives other ids than the "
            f"{type(hf_tokenizer).__name__} of training: transformers picks the class by the model's type. "
            f"Train with the tokenizer that belongs to that type of model."
        )


def _record_dtype(config_file: str, dtype: torch.dtype) -> None:
    """`save_pretrained` records the dtype of the model in memory, not of the state that it was
    handed.
    """
    with open(config_file, encoding="utf-8") as file:
        config = json.load(file)
    config["dtype"] = str(dtype).removeprefix("torch.")
    with open(config_file, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
        file.write("\n")


def _system(visual_tokenizer_dir: str) -> str:
    with open(os.path.join(visual_tokenizer_dir, "config.json"), encoding="utf-8") as file:
        return json.load(file)["system"]
