"""An exported model in use: text → images, images and questions → text.

Axes: B images, T codes of an image.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from smalti.errors import ArtifactError, ConfigError, VocabularyError
from smalti.images import to_pixels
from smalti.mllm.bridge import Bridge, load_bridge
from smalti.mllm.build import UNREADABLE, load_causal_lm
from smalti.mllm.depth import draw_places
from smalti.mllm.diffusion import NEEDS_DIFFUSERS, Diffuser
from smalti.mllm.export import SETTINGS
from smalti.mllm.generation import answer, draw, sample_seed
from smalti.mllm.prompts import TextEncoder
from smalti.mllm.visual_side import load_side
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import Sampling
from smalti.storage import exists, join, local_copy, read_json


class VisualModel:
    """A model that `smalti export` wrote: the language model, its tokenizer and (on first use) the
    visual tokenizer.
    """

    def __init__(
        self, lm: Any, hf_tokenizer: Any, settings: dict[str, Any], visual_tokenizer_dir: str
    ) -> None:
        self.lm, self.hf_tokenizer, self.settings = lm, hf_tokenizer, settings
        self.vocabulary = VisualVocabulary.from_tokenizer(hf_tokenizer)
        self.text = TextEncoder(hf_tokenizer, self.vocabulary)
        self._visual_tokenizer_dir = visual_tokenizer_dir
        self._bridge: tuple[Bridge, Tensor] | None = None
        if self.vocabulary.num_codes != settings["num_codes"]:
            raise VocabularyError(
                f"{SETTINGS} says {settings['num_codes']} visual codes, but the tokenizer beside it has "
                f"{self.vocabulary.num_codes}: the folder is mixed from two exports. Export again."
            )

    @classmethod
    def from_pretrained(
        cls, export_dir: str, device: str | torch.device | None = None
    ) -> VisualModel:
        """Load the folder (or URL) that `smalti export` wrote, to `device` (default: CUDA where
        there is one, else CPU).
        """
        if not exists(join(export_dir, SETTINGS)):
            raise ArtifactError(
                f"{export_dir} has no {SETTINGS}, so it is no exported model. Give the folder that `smalti export` wrote."
            )
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        settings = read_json(join(export_dir, SETTINGS))
        with local_copy(export_dir) as folder:
            lm, hf_tokenizer = _load(folder, export_dir)
            if "visual_side" in settings:
                lm = load_side(
                    folder,
                    lm,
                    VisualVocabulary.from_tokenizer(hf_tokenizer),
                    settings["visual_side"],
                )
            model = cls(
                lm.to(target),
                hf_tokenizer,
                settings,
                os.path.join(folder, settings["visual_tokenizer"]),
            )
            if exists(join(folder, "bridge")):
                bridge, codes_VC = load_bridge(os.path.join(folder, "bridge"))
                model._bridge = bridge.to(target), codes_VC
            if folder != export_dir:
                model.visual_tokenizer  # noqa: B018 (the local copy of a URL is gone after this block)
        return model

    @property
    def device(self) -> torch.device:
        """Where the language model stands."""
        return next(self.lm.parameters()).device

    @property
    def num_tokens(self) -> int:
        """T, codes of an image."""
        return int(self.settings["tokens"])

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Of the codes of a token: () or (2, R)."""
        return tuple(self.settings.get("code_shape", ()))

    @cached_property
    def visual_tokenizer(self) -> Any:
        """The visual tokenizer that was exported along."""
        from smalti.tokenizers.loading import load_tokenizer

        return load_tokenizer(self._visual_tokenizer_dir).to(self.device).eval()

    def draw_codes(
        self,
        prompts: Sequence[str],
        *,
        cfg: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
        compile: str | None = None,
    ) -> Tensor:
        """Codes of one image a prompt: int64 (B, T, *code_shape) on the CPU.

        An empty prompt draws without a condition.

        `seed` and a prompt's place in the list decide its random numbers, whatever the batch size.
        compile: see `smalti.mllm.generation.draw`.
        """
        sampling = Sampling(cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p)
        ids = [self.text.caption_prompt(prompt) for prompt in prompts]
        seeds = [sample_seed(seed, index) for index in range(len(ids))]
        drawing = (
            partial(draw_places, self.lm)
            if self.code_shape
            else partial(draw, self.lm, self.vocabulary)
        )
        one = partial(drawing, tokens=self.num_tokens, sampling=sampling, compile=compile)
        parts = [one(ids[part], seed=seeds[part]) for part in _batches(len(ids), batch_size)]
        return (
            torch.cat(parts)
            if parts
            else torch.empty((0, self.num_tokens, *self.code_shape), dtype=torch.int64)
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        cfg: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
        compile: str | None = None,
    ) -> list[Image.Image]:
        """One RGB picture a prompt; see `draw_codes`.

        ConfigError: nothing here turns codes into pictures.
        """
        if self.cannot_draw:  # before any code is drawn
            raise ConfigError(self.cannot_draw)
        codes_BT = self.draw_codes(
            prompts,
            cfg=cfg,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            compile=compile,
        )
        parts = list(_batches(len(codes_BT), batch_size))
        seeds = [sample_seed(seed, index) for index in range(len(codes_BT))]
        return [picture for part in parts for picture in self.decode(codes_BT[part], seeds[part])]

    def ask(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 32,
    ) -> list[str]:
        """The answer to one question about each picture (as many of one as of the other)."""
        _same_number(len(images), questions)
        answers = []
        for part in _batches(len(images), batch_size):
            answers += self.ask_codes(
                self.encode(images[part]), questions[part], max_new_tokens, batch_size
            )
        return answers

    def ask_codes(
        self,
        codes_BT: Tensor,
        questions: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 32,
    ) -> list[str]:
        """As `ask`, for images that are codes already, int (B, T, *code_shape).

        Questions of like length go into a batch together.
        """
        _same_number(len(codes_BT), questions)
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        answers = [""] * len(questions)
        for part in _batches(len(order), batch_size):
            chosen = order[part]
            asked = [questions[i] for i in chosen]
            found = answer(
                self.lm, self.hf_tokenizer, self.vocabulary, codes_BT[chosen], asked, max_new_tokens
            )
            for i, text in zip(chosen, found, strict=True):
                answers[i] = text
        return answers

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Codes of pictures of any size and mode (resized and centre-cropped as in training): int64
        (B, T, *code_shape).
        """
        size = int(self.settings["image_size"])
        pixels = np.stack([to_pixels(_png(image), size) for image in images])
        pixels_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        return self.visual_tokenizer.encode(pixels_BCHW.to(self.device))

    @cached_property
    def cannot_draw(self) -> str | None:
        """Why codes cannot be turned into pictures; None where they can."""
        if getattr(self.visual_tokenizer, "has_decoder", True):
            return None
        if self._bridge is None:
            return self.visual_tokenizer.no_decoder
        return None if find_spec("diffusers") else NEEDS_DIFFUSERS

    @cached_property
    def _diffuser(self) -> Diffuser:
        """The diffusion decoder that the export's bridge leads to."""
        assert self._bridge is not None
        return Diffuser(self._bridge[0].section.decoder, self.device)

    @torch.no_grad()
    def decode(self, codes_BT: Tensor, seeds: Sequence[int] | None = None) -> list[Image.Image]:
        """Pictures of codes; those of a diffusion decoder follow from `seeds` too (default: their
        places).
        """
        if not getattr(self.visual_tokenizer, "has_decoder", True) and self._bridge is not None:
            bridge, codes_VC = self._bridge
            given = bridge(codes_VC[codes_BT.cpu()].to(self.device))
            seeds = range(len(codes_BT)) if seeds is None else seeds
            return (
                self._diffuser.draw(given, seeds, bridge.section.steps, bridge.section.guidance)
                if len(seeds)
                else []
            )
        pixels_BCHW = self.visual_tokenizer.decode(codes_BT.to(self.device)).float().cpu()
        pixels = (
            pixels_BCHW.add(1)
            .mul(127.5)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            .permute(0, 2, 3, 1)
            .numpy()
        )
        return [Image.fromarray(array) for array in pixels]


def _load(folder: str, export_dir: str) -> tuple[Any, Any]:
    """Language model, in eval mode, and tokenizer.

    ArtifactError: missing, torn or incomplete ones.
    """
    try:
        lm, missing = load_causal_lm(folder)
        hf_tokenizer = AutoTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        told = (str(error).splitlines() or [repr(error)])[0].rstrip(".")
        raise ArtifactError(
            f"{export_dir} holds no whole language model ({told}). Export it again."
        ) from error
    if missing:
        raise ArtifactError(
            f"{export_dir} lacks {len(missing)} weights of its language model, the first {missing[0]}. Export it again."
        )
    return lm.eval(), hf_tokenizer


def _batches(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, start + size)


def _same_number(images: int, questions: Sequence[str]) -> None:
    if images != len(questions):
        raise VocabularyError(
            f"{images} images but {len(questions)} questions: give one question for each image."
        )


def _png(image: Image.Image) -> bytes:
    """Lossless bytes of a picture, so that pictures and files take the one way to pixels."""
    stream = io.BytesIO()
    image.save(
        stream,
        format="PNG" if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16") else "TIFF",
    )
    return stream.getvalue()
