"""Save and load the visual side of an exported `DepthModel`: adapter, heads, code vectors.

The language model's part is an ordinary Hugging Face folder; `visual_heads.safetensors` is read by
this project only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from smalti.errors import ArtifactError
from smalti.mllm.adapters import ADAPTERS
from smalti.mllm.depth import DepthModel
from smalti.mllm.language_model import input_embedding, output_head
from smalti.mllm.losses import LossHead
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import DepthHeads

WEIGHTS = "visual_heads.safetensors"
_CODES = "code_vectors"


def side_settings(model: DepthModel) -> dict[str, object]:
    """The settings of the visual side in `smalti.json`."""
    return {
        "adapter": next(name for name, kind in ADAPTERS.items() if type(model.adapter) is kind),
        "splits": list(model.adapter.splits),
        "adapter_hidden": model.adapter.hidden,
        "size": model.size.model_dump(mode="json"),
        "depth": model.depth,
    }


def save_side(model: DepthModel, out_dir: str, dtype: torch.dtype) -> int:
    """Write the visual side into a local folder.

    Args:
        model: the model.
        out_dir: an existing folder.
        dtype: of the written parameters; buffers keep theirs, code vectors are float32.

    Returns:
        The number of parameters.
    """
    trained = {name for name, _ in model.named_parameters()}
    count = 0
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("lm."):
            continue
        if name in trained:
            count += tensor.numel()
            tensor = tensor.to(dtype)
        tensors[name] = tensor.detach().cpu().contiguous()
    tensors[_CODES] = model.code_vectors_VC.detach().float().cpu().contiguous()
    save_file(tensors, os.path.join(out_dir, WEIGHTS), metadata={"format": "pt"})
    return count


def load_side(
    folder: str,
    causal_lm: PreTrainedModel,
    vocabulary: VisualVocabulary,
    settings: Mapping[str, Any],
) -> DepthModel:
    """Load a `DepthModel` from an export.

    Args:
        folder: a local folder that `save_side` wrote to.
        causal_lm: the exported language model; changed and owned by the result.
        vocabulary: layout of its tokenizer.
        settings: as `side_settings` gave them.

    Raises:
        ArtifactError: if weights are missing or torn.
    """
    try:
        tensors = load_file(os.path.join(folder, WEIGHTS))
        cut_rows(causal_lm, vocabulary)
        width = input_embedding(causal_lm).embedding_dim
        adapter = ADAPTERS[settings["adapter"]](
            settings["splits"], settings["adapter_hidden"], width
        )
        size = DepthHeads.model_validate(settings["size"])
        codes = tensors.pop(_CODES)
        with torch.device("meta"):  # the heads get their weights below
            model = DepthModel(
                causal_lm, adapter, codes, vocabulary, size=size, depth=settings["depth"]
            )
        lm = {f"lm.{name}": tensor for name, tensor in causal_lm.state_dict().items()}
        model.load_state_dict(lm | tensors, assign=True)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ArtifactError(
            f"{folder}/{WEIGHTS} is missing, torn or of another model: {error}. Export it again."
        ) from error
    return model.eval()


def cut_rows(causal_lm: PreTrainedModel, vocabulary: VisualVocabulary) -> None:
    """Give an exported language model the matrices of a unified one, in place.

    Embedding rows up to the first visual token, and a head that can compute its loss.
    """
    embed = input_embedding(causal_lm)
    head = output_head(causal_lm)
    embed.weight = nn.Parameter(embed.weight.detach()[: vocabulary.first_visual].clone())
    embed.num_embeddings = vocabulary.first_visual
    embed.padding_idx = None
    own = LossHead(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    own.weight = head.weight
    own.bias = head.bias
    causal_lm.set_output_embeddings(own)
