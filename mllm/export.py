"""The embedding swap: a unified model as a plain Hugging Face folder.

The adapter's output for a code depends on that code alone, so it can be written into the code's
embedding row (arXiv 2503.06764, Algorithm 1). The result loads with `AutoModelForCausalLM` and
`AutoTokenizer` without this project, and gives the same logits.

Axes: V rows of the head, H width of the language model, n codes of a chunk.
"""

from __future__ import annotations

import json
import os
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smalti.errors import VocabularyError
from smalti.mllm.depth import DepthModel
from smalti.mllm.model import UnifiedModel
from smalti.mllm.prompts import UNCONDITIONAL
from smalti.mllm.visual_side import save_side, side_settings
from smalti.mllm.visual_tokenizer import VisualTokenizer
from smalti.mllm.vocabulary import DELIMITERS, VisualVocabulary, visual_token
from smalti.tokenizers.encoders import quiet

FORMAT = 1
SETTINGS = "smalti.json"
VISUAL_TOKENIZER = "visual_tokenizer"
MAX_FILE = "4GB"
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    model: UnifiedModel,
    hf_tokenizer: PreTrainedTokenizerBase,
    tokenizer_path: str,
    out_dir: str,
    dtype: Literal["fp32", "bf16"] = "fp32",
    *,
    chunk: int = 8192,
) -> dict[str, int]:
    """Write the plain model into a local folder.

    Beside the usual files it gets `smalti.json` (tokens per image, patch grid, first visual id,
    system) and `visual_tokenizer/`, a copy of the visual tokenizer, so that the folder is complete.
    The plain part of a `DepthModel` reads and writes text only; `visual_heads.safetensors` holds
    the parts that see and draw. The unified model is not changed.

    Args:
        model: the trained model.
        hf_tokenizer: its text tokenizer.
        tokenizer_path: folder of the visual tokenizer.
        out_dir: created if missing.
        dtype: of the written weights.
        chunk: number of codes that pass the adapter at once.

    Returns:
        Numbers of parameters, embedding rows and codes.

    Raises:
        VocabularyError: if a tokenizer is not the one of training.
    """
    from smalti.tokenizers.loading import load_tokenizer

    visual = load_tokenizer(tokenizer_path)
    if visual.num_codes != model.num_codes:
        raise VocabularyError(
            f"{tokenizer_path} has {visual.num_codes} codes, but this model was trained with "
            f"{model.num_codes} visual codes. Export it with the tokenizer that created its tokens."
        )
    os.makedirs(out_dir, exist_ok=True)
    counts = export_language_model(model, hf_tokenizer, out_dir, DTYPES[dtype], chunk)
    visual.save_pretrained(os.path.join(out_dir, VISUAL_TOKENIZER))
    settings = _settings(model, visual, out_dir)
    if isinstance(model, DepthModel):
        counts["parameters"] += save_side(model, out_dir, DTYPES[dtype])
        counts["codes"] = visual.num_codes
        settings["code_shape"] = list(visual.code_shape)
        settings["visual_side"] = side_settings(model)
    with open(os.path.join(out_dir, SETTINGS), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2)
    return counts


def _settings(model: UnifiedModel, visual: VisualTokenizer, out_dir: str) -> dict[str, object]:
    return {
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


def export_language_model(
    model: UnifiedModel,
    hf_tokenizer: PreTrainedTokenizerBase,
    out_dir: str,
    dtype: torch.dtype,
    chunk: int = 8192,
) -> dict[str, int]:
    """Write the Hugging Face part of an export.

    Weights with every embedding row, configs, tokenizer and chat template.

    Returns:
        Numbers of parameters, embedding rows and codes.
    """
    lm = model.lm
    embed = model.embedding
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in lm.state_dict().items()
    }
    embed_name = next(name for name, module in lm.named_modules() if module is embed)
    rows_VH = swapped_rows(model, dtype, chunk)
    state[f"{embed_name}.weight"] = rows_VH
    with quiet():
        lm.save_pretrained(out_dir, state_dict=state, max_shard_size=MAX_FILE)
    _record_dtype(os.path.join(out_dir, "config.json"), dtype)
    hf_tokenizer.save_pretrained(out_dir)
    _check_tokenizer(model.vocabulary, hf_tokenizer, out_dir)
    own = sum(p.numel() for p in lm.parameters())
    return {
        "parameters": own - embed.weight.numel() + rows_VH.numel(),
        "embedding_rows": len(rows_VH),
        "codes": model.vocabulary.num_codes,
    }


@torch.no_grad()
def swapped_rows(model: UnifiedModel, dtype: torch.dtype, chunk: int = 8192) -> Tensor:
    """The whole embedding matrix (V, H): text rows, then the adapter's output for every code.

    Rows beyond the vocabulary (padding of the published model) are zero: no token uses them.
    """
    embed = model.embedding
    first = model.vocabulary.first_visual
    rows_VH = torch.zeros((model.head.out_features, embed.embedding_dim), dtype=dtype)
    rows_VH[:first] = embed.weight.to(dtype).cpu()
    for start in range(0, model.vocabulary.num_codes, chunk):
        vectors_nH = model.visual_rows(start, start + chunk)
        rows_VH[first + start : first + start + len(vectors_nH)] = vectors_nH.to(dtype).cpu()
    return rows_VH


_PROBE = "A blue circle, isn't it?\n 1234  Ünïcode <start_of_image><IMG_0>"


def _check_tokenizer(
    vocabulary: VisualVocabulary, hf_tokenizer: PreTrainedTokenizerBase, out_dir: str
) -> None:
    """Raise VocabularyError unless the written tokenizer loads as that of training.

    `AutoTokenizer` chooses a class by the model's type and may replace a custom tokenizer's
    normalisation or word split.
    """
    loaded = AutoTokenizer.from_pretrained(out_dir)
    same = loaded(_PROBE)["input_ids"] == hf_tokenizer(_PROBE)["input_ids"]
    if not same or VisualVocabulary.from_tokenizer(loaded) != vocabulary:
        raise VocabularyError(
            f"The exported tokenizer in {out_dir} loads as {type(loaded).__name__} and gives other "
            f"ids than the {type(hf_tokenizer).__name__} of training: transformers picks the class "
            "by the model's type. Train with the tokenizer that belongs to that type of model."
        )


def _record_dtype(config_file: str, dtype: torch.dtype) -> None:
    """Record the dtype of the written weights.

    `save_pretrained` records that of the model in memory.
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
