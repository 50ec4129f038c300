"""What the export of a `DepthModel` holds beside its plain language model: adapter, heads and code
vectors, and their way back.

The language model's part is an ordinary Hugging Face folder; `visual_heads.safetensors` is read by
this project alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from smalti.errors import ArtifactError
from smalti.mllm.adapters import ADAPTERS
from smalti.mllm.depth import DepthModel
from smalti.mllm.losses import LossHead
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import DepthHeads

WEIGHTS = "visual_heads.safetensors"
_CODES = "code_vectors"


def side_settings(model: DepthModel) -> dict[str, Any]:
    """What `smalti.json` keeps of the visual side."""
    return {
        "adapter": next(name for name, kind in ADAPTERS.items() if type(model.adapter) is kind),
        "splits": list(model.adapter.splits),
        "adapter_hidden": model.adapter.hidden,
        "size": model.size.model_dump(mode="json"),
        "depth": model.depth,
    }


def save_side(model: DepthModel, out_dir: str, dtype: torch.dtype) -> int:
    """Write the visual side into the local folder, its parameters in `dtype`; their number comes
    back.
    """
    trained = {name for name, _ in model.named_parameters()}
    own = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm.")
    }
    tensors = {
        n: t.detach().cpu().to(dtype if n in trained else t.dtype).contiguous()
        for n, t in own.items()
    }
    tensors[_CODES] = model.code_vectors_VC.detach().float().cpu().contiguous()
    save_file(tensors, os.path.join(out_dir, WEIGHTS), metadata={"format": "pt"})
    return sum(tensor.numel() for name, tensor in own.items() if name in trained)


def load_side(
    folder: str, causal_lm: Any, vocabulary: VisualVocabulary, settings: Mapping[str, Any]
) -> DepthModel:
    """The model around an exported language model, which is taken over.

    ArtifactError: missing or torn weights.
    """
    try:
        tensors = load_file(os.path.join(folder, WEIGHTS))
        cut_rows(causal_lm, vocabulary)
        width = causal_lm.get_input_embeddings().embedding_dim
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


def cut_rows(causal_lm: Any, vocabulary: VisualVocabulary) -> None:
    """Give a language model of the whole vocabulary the matrices of a unified one: embedding rows
    up to the first visual token, and a head that can compute its loss.
    """
    embed, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    embed.weight = nn.Parameter(embed.weight.detach()[: vocabulary.first_visual].clone())
    embed.num_embeddings, embed.padding_idx = vocabulary.first_visual, None
    own = LossHead(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    own.weight, own.bias = head.weight, head.bias
    causal_lm.set_output_embeddings(own)
