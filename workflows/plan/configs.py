"""Configs of the models that a recipe names.

They come from a folder or the hub's cache, else from a table of public models, else from the hub.
The table repeats these models' own config.json files (vision side of SigLIP and SigLIP 2, Qwen2.5),
so that known models can be planned without a network; a plan that uses it says so.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import cast

from transformers import AutoConfig, AutoTokenizer, Qwen2Config, SiglipVisionConfig
from transformers.configuration_utils import PreTrainedConfig

from smalti import storage
from smalti.errors import ConfigError
from smalti.tokenizers.encoders import quiet

QWEN25_TOKENS = 151_665  # len(tokenizer); the matrices are padded beyond it
QWEN25 = {  # width, MLP width, layers, heads, key-value heads, rows of the matrices, tied
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
    "72B": (8192, 29_568, 80, 64, 8, 152_064, False),
}
SIGLIP = {  # width, MLP width, layers, heads
    "base": (768, 3072, 12, 12),
    "large": (1024, 4096, 24, 16),
    "so400m": (1152, 4304, 27, 16),
    "giant-opt": (1536, 6144, 40, 16),
}
TABLE = "sizes from smalti's table of public models"


def vision_config(name: str) -> tuple[SiglipVisionConfig, str]:
    """Config of a SigLIP's vision tower, and where it comes from.

    Raises:
        ConfigError: for a model that is neither found nor known.
    """
    match = re.fullmatch(
        r"google/siglip2?-(base|large|so400m|giant-opt)-patch(\d+)-(\d+)(-i18n)?", name
    )
    found, why = _own_config(name, ask_hub=match is None)
    if found is not None:
        return cast(SiglipVisionConfig, getattr(found, "vision_config", found)), why
    if match is None:
        raise _unknown("encoder.pretrained", name, why, "google/siglip-so400m-patch14-384")
    width, hidden, layers, heads = SIGLIP[match[1]]
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=int(match[2]),
        image_size=int(match[3]),
    )
    return config, f"{name}: {TABLE}"


def language_config(name: str) -> tuple[PreTrainedConfig, int, str]:
    """Config of a causal language model, tokens of its text tokenizer, and where both come from.

    The tokens are the rows of the embedding, unless the table knows better.

    Raises:
        ConfigError: for a model that is neither found nor known.
    """
    match = re.fullmatch(r"Qwen/Qwen2\.5-(?:Coder-|Math-)?([\d.]+B)(-Instruct)?", name)
    sizes = QWEN25.get(match[1]) if match else None
    found, why = _own_config(name, ask_hub=sizes is None)
    if found is not None:
        tokens = QWEN25_TOKENS if match else _text_tokens(name)
        return found, tokens or int(found.get_text_config().vocab_size), why
    if sizes is None:
        raise _unknown("mllm.pretrained", name, why, "Qwen/Qwen2.5-7B-Instruct")
    width, hidden, layers, heads, kv_heads, rows, tied = sizes
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=rows,
        tie_word_embeddings=tied,
        use_sliding_window=False,
    )
    return config, QWEN25_TOKENS, f"{name}: {TABLE}"


@cache
def _own_config(name: str, ask_hub: bool) -> tuple[PreTrainedConfig | None, str]:
    """Config and origin, from a folder, a URL, the local cache, or the hub.

    (None, the reason): there is none.
    """
    try:
        if not storage.is_local(name):  # its config alone, not the weights beside it
            read = storage.read_json(storage.join(name, "config.json"))
            return AutoConfig.for_model(**read), f"{name}: its own config"
        with quiet():
            config = AutoConfig.from_pretrained(
                storage.local_path(name), local_files_only=not ask_hub
            )
            return config, f"{name}: its own config"
    except (
        Exception
    ) as error:  # transformers, fsspec and the hub's client each have errors of their own
        return None, (str(error).splitlines() or [repr(error)])[0].rstrip(".")


def _text_tokens(name: str) -> int | None:
    """Tokens of the text tokenizer in a local folder; None if there is none."""
    if not os.path.isdir(storage.local_path(name)):
        return None
    try:
        with quiet():
            return len(AutoTokenizer.from_pretrained(storage.local_path(name)))
    except (OSError, ValueError):
        return None


def _unknown(key: str, name: str, why: str, example: str) -> ConfigError:
    where = "that folder" if os.path.isdir(name) else "the hub"
    return ConfigError(
        f"{key}={name}: its config cannot be read from {where} ({why}), and it is none of the "
        f"public models whose sizes are known here, such as {example}. Give a local folder with "
        "its config.json."
    )
