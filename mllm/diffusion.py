"""A pretrained diffusion decoder: its frozen text encoders, which a bridge learns from, and drawing
with it (diffusers).

Axes: B prompts or images, L places of a prompt, E width of its embedding, P of its pooled
embedding.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import cached_file

from smalti.errors import ConfigError
from smalti.mllm.bridge import Conditioning
from smalti.tokenizers.encoders import quiet

INDEX = "model_index.json"
AT_ONCE = 4  # pictures: a whole batch of codes would not fit on a GPU
NEEDS_DIFFUSERS = (
    "Drawing from codes needs the package diffusers, which is not installed here. Run `pip install diffusers`; training the "
    "bridge does without it."
)


def _stable_diffusion(out: Mapping[str, Any]) -> Conditioning:
    return Conditioning(out["text_encoder"].last_hidden_state, None)


def _sdxl(out: Mapping[str, Any]) -> Conditioning:
    last_but_one = [out[name].hidden_states[-2] for name in ("text_encoder", "text_encoder_2")]
    return Conditioning(torch.cat(last_but_one, -1), out["text_encoder_2"].text_embeds)


def _flux(out: Mapping[str, Any]) -> Conditioning:
    return Conditioning(out["text_encoder_2"].last_hidden_state, out["text_encoder"].pooler_output)


PIPELINES: dict[str, Callable[[Mapping[str, Any]], Conditioning]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _sdxl,
    "FluxPipeline": _flux,
}
"""What of the text encoders' outputs a pipeline of diffusers is conditioned on, by its class."""


class PromptSide(nn.Module):
    """The text encoders of a diffusion decoder, frozen: prompts → what the decoder is conditioned
    on.
    """

    def __init__(
        self, pipeline: str, encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.pipeline, self.tokenizers = pipeline, dict(tokenizers)
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, decoder: str, *, meta: bool = False) -> PromptSide:
        """Of a pipeline's folder or hub name, in float32; the rest of the pipeline is not read, and
        diffusers is not needed.

        meta: shapes alone. ConfigError: none there, or a pipeline that is not known.
        """
        index = read_index(decoder)
        encoders, tokenizers = {}, {}
        try:
            with quiet():
                for name in ("text_encoder", "text_encoder_2"):
                    kind: Any = getattr(
                        transformers, (index.get(name) or [None, None])[1] or "", None
                    )
                    if kind is None:
                        continue
                    where = {"subfolder": name}
                    if meta:
                        with torch.device("meta"):
                            encoders[name] = kind(
                                kind.config_class.from_pretrained(decoder, **where)
                            )
                    else:
                        encoders[name] = kind.from_pretrained(decoder, dtype=torch.float32, **where)
                    there = name.replace("text_encoder", "tokenizer")
                    tokenizers[name] = AutoTokenizer.from_pretrained(decoder, subfolder=there)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"bridge.decoder={decoder}: its text encoders do not load: {error}"
            ) from error
        return cls(index["_class_name"], encoders, tokenizers)

    def train(self, mode: bool = True) -> PromptSide:
        """Stay in eval mode: it is frozen."""
        return super().train(False)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids for each encoder, padded to its full length: int64 (B, L)."""
        found = {}
        for name, tokenizer in self.tokenizers.items():
            told = {
                "padding": "max_length",
                "truncation": True,
                "max_length": tokenizer.model_max_length,
            }
            found[name] = tokenizer(list(prompts), return_tensors="pt", **told)["input_ids"]
        return found

    @torch.no_grad()
    def forward(self, ids: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning of tokenized prompts, as the pipeline itself would make it."""
        out = {
            name: self.encoders[name](ids_BL, output_hidden_states=True)
            for name, ids_BL in ids.items()
        }
        found = PIPELINES[self.pipeline](out)
        return Conditioning(
            found.sequence.float(), None if found.pooled is None else found.pooled.float()
        )


def read_index(decoder: str) -> dict[str, Any]:
    """`model_index.json` of a pipeline. ConfigError: none there, or a class that is not known."""
    try:
        with quiet():
            path = cached_file(decoder, INDEX)
        with open(str(path), encoding="utf-8") as file:
            index = json.load(file)
    except (OSError, ValueError) as error:
        told = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(
            f"bridge.decoder={decoder} is no pipeline of diffusers: its {INDEX} cannot be read ({told})"
        ) from error
    if index.get("_class_name") not in PIPELINES:
        raise ConfigError(
            f"bridge.decoder={decoder} is a {index.get('_class_name')}; what a bridge can learn for are "
            f"{', '.join(PIPELINES)}. Take a decoder of one of these."
        )
    return index


def require_diffusers() -> None:
    """ConfigError where diffusers is not installed."""
    if find_spec("diffusers") is None:
        raise ConfigError(NEEDS_DIFFUSERS)


class Diffuser:
    """A pipeline of diffusers that draws from conditioning in place of prompts.

    ConfigError: no diffusers, no such pipeline.
    """

    def __init__(self, decoder: str, device: torch.device) -> None:
        require_diffusers()
        read_index(decoder)
        diffusers: Any = importlib.import_module("diffusers")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            with quiet():
                self.pipeline = diffusers.DiffusionPipeline.from_pretrained(
                    decoder, torch_dtype=dtype
                ).to(device)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"bridge.decoder={decoder} does not load as a whole pipeline: {error}"
            ) from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.device, self.dtype = device, dtype

    def draw(
        self, given: Conditioning, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """One picture for each row of the conditioning, `AT_ONCE` at a time; a seed a picture,
        whatever the batch.
        """
        drawn: list[Image.Image] = []
        takes_pooled = "pooled_prompt_embeds" in signature(self.pipeline.__call__).parameters
        for start in range(0, len(seeds), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            wanted = {"prompt_embeds": given.sequence[rows].to(self.device, self.dtype)}
            if takes_pooled and given.pooled is not None:
                wanted["pooled_prompt_embeds"] = given.pooled[rows].to(self.device, self.dtype)
            own = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            told = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": own}
            drawn += self.pipeline(**wanted, **told).images
        return drawn
