"""A pretrained diffusion decoder: its frozen text encoders, and drawing with it (diffusers).

A bridge learns from the text encoders.

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
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from smalti.errors import ConfigError
from smalti.mllm.bridge import Conditioning
from smalti.tokenizers.encoders import quiet

INDEX = "model_index.json"
AT_ONCE = 4  # pictures; a whole batch would not fit on a GPU
NEEDS_DIFFUSERS = (
    "Drawing from codes needs the package diffusers, which is not installed here. Run `pip install "
    "diffusers`. Training the bridge does not need it."
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
"""The conditioning of a pipeline of diffusers from its text encoders' outputs, by its class."""


class PromptSide(nn.Module):
    """The frozen text encoders of a diffusion decoder: prompts → conditioning.

    Args:
        pipeline: class of the pipeline, a key of `PIPELINES`.
        encoders: text encoders by name.
        tokenizers: their tokenizers, by the encoders' names.
    """

    def __init__(
        self,
        pipeline: str,
        encoders: Mapping[str, nn.Module],
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
    ) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.tokenizers = dict(tokenizers)
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, decoder: str, *, meta: bool = False) -> PromptSide:
        """Load the text encoders of a pipeline, in float32.

        The rest of the pipeline is not read, and diffusers is not needed.

        Args:
            decoder: a pipeline's folder or hub name.
            meta: load shapes only.

        Raises:
            ConfigError: if there is no pipeline, or if it is of an unknown class.
        """
        index = read_index(decoder)
        encoders: dict[str, PreTrainedModel] = {}
        tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        try:
            with quiet():
                for name in ("text_encoder", "text_encoder_2"):
                    kind = getattr(transformers, _class_of(index, name), None)
                    if kind is None:
                        continue
                    encoders[name] = _load_encoder(kind, decoder, name, meta)
                    folder = name.replace("text_encoder", "tokenizer")
                    tokenizers[name] = AutoTokenizer.from_pretrained(decoder, subfolder=folder)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"bridge.decoder={decoder}: its text encoders do not load: {error}"
            ) from error
        return cls(index["_class_name"], encoders, tokenizers)

    def train(self, mode: bool = True) -> PromptSide:
        """Stay in eval mode: the encoders are frozen."""
        return super().train(False)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids for each encoder, padded to its full length: int64 (B, L)."""
        found = {}
        for name, tokenizer in self.tokenizers.items():
            encoding = tokenizer(
                list(prompts),
                return_tensors="pt",
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
            )
            found[name] = encoding["input_ids"]
        return found

    @torch.no_grad()
    def forward(self, ids: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning of tokenized prompts, as the pipeline itself computes it: float32."""
        out = {
            name: self.encoders[name](ids_BL, output_hidden_states=True)
            for name, ids_BL in ids.items()
        }
        found = PIPELINES[self.pipeline](out)
        pooled = None if found.pooled is None else found.pooled.float()
        return Conditioning(found.sequence.float(), pooled)


def _class_of(index: Mapping[str, Any], name: str) -> str:
    """The class of a pipeline's module; "" if it has no such module."""
    library_and_class = index.get(name) or (None, None)
    return library_and_class[1] or ""


def _load_encoder(
    kind: type[PreTrainedModel], decoder: str, subfolder: str, meta: bool
) -> PreTrainedModel:
    if not meta:
        return kind.from_pretrained(decoder, dtype=torch.float32, subfolder=subfolder)
    assert kind.config_class is not None
    with torch.device("meta"):
        return kind(kind.config_class.from_pretrained(decoder, subfolder=subfolder))


def read_index(decoder: str) -> dict[str, Any]:
    """Read `model_index.json` of a pipeline.

    Raises:
        ConfigError: if there is none, or if the pipeline's class is unknown.
    """
    try:
        with quiet():
            path = cached_file(decoder, INDEX)
        with open(str(path), encoding="utf-8") as file:
            index = json.load(file)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(
            f"bridge.decoder={decoder} is no pipeline of diffusers: its {INDEX} cannot be read "
            f"({reason}). Set it to the folder or hub name of a text-to-image pipeline."
        ) from error
    if index.get("_class_name") not in PIPELINES:
        raise ConfigError(
            f"bridge.decoder={decoder} is a {index.get('_class_name')}; a bridge can be trained "
            f"for {', '.join(PIPELINES)}. Set a decoder of one of these classes."
        )
    return index


def require_diffusers() -> None:
    """Raise ConfigError unless diffusers is installed."""
    if find_spec("diffusers") is None:
        raise ConfigError(NEEDS_DIFFUSERS)


class Diffuser:
    """A pipeline of diffusers that draws from conditioning instead of prompts.

    Args:
        decoder: the pipeline's folder or hub name.
        device: it runs in bf16 on CUDA, else in float32.

    Raises:
        ConfigError: if diffusers is missing, or if the pipeline does not load.
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
                f"bridge.decoder={decoder} does not load as a complete pipeline: {error}"
            ) from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.device = device
        self.dtype = dtype

    def draw(
        self, given: Conditioning, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """Draw one picture per row of the conditioning, `AT_ONCE` at a time.

        Args:
            given: conditioning of B pictures.
            seeds: one per picture; a picture does not depend on its batch.
            steps: steps of the diffusion.
            guidance: scale of classifier-free guidance.
        """
        drawn: list[Image.Image] = []
        takes_pooled = "pooled_prompt_embeds" in signature(self.pipeline.__call__).parameters
        for start in range(0, len(seeds), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            wanted = {"prompt_embeds": given.sequence[rows].to(self.device, self.dtype)}
            if takes_pooled and given.pooled is not None:
                wanted["pooled_prompt_embeds"] = given.pooled[rows].to(self.device, self.dtype)
            drawn += self.pipeline(
                **wanted,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
            ).images
        return drawn
