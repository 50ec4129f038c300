"""Use an exported model: text → images, images and questions → text.

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
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smalti.errors import ArtifactError, ConfigError, VocabularyError
from smalti.images import to_pixels
from smalti.mllm.base_lm import UNREADABLE, load_causal_lm
from smalti.mllm.bridge import Bridge, load_bridge
from smalti.mllm.decoder import CausalLM
from smalti.mllm.depth import DepthModel, draw_places
from smalti.mllm.diffusion import NEEDS_DIFFUSERS, Diffuser
from smalti.mllm.export import SETTINGS
from smalti.mllm.generation import answer, draw
from smalti.mllm.prompts import TextEncoder
from smalti.mllm.sampling import sample_seed
from smalti.mllm.visual_side import load_side
from smalti.mllm.visual_tokenizer import VisualTokenizer
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import Sampling
from smalti.storage import exists, join, local_copy, read_json


class VisualModel:
    """An exported model: language model, text tokenizer and visual tokenizer.

    The visual tokenizer is loaded on first use.

    Raises:
        VocabularyError: if tokenizer and settings are of different exports.
    """

    def __init__(
        self,
        lm: CausalLM,
        hf_tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        visual_tokenizer_dir: str,
    ) -> None:
        self.lm = lm
        self.hf_tokenizer = hf_tokenizer
        self.settings = settings
        self.vocabulary = VisualVocabulary.from_tokenizer(hf_tokenizer)
        self.text = TextEncoder(hf_tokenizer, self.vocabulary)
        self._visual_tokenizer_dir = visual_tokenizer_dir
        self._bridge: tuple[Bridge, Tensor] | None = None
        if self.vocabulary.num_codes != settings["num_codes"]:
            raise VocabularyError(
                f"{SETTINGS} records {settings['num_codes']} visual codes, but the tokenizer in "
                f"the same folder has {self.vocabulary.num_codes}: the folder is mixed from two "
                "exports. Export again."
            )

    @classmethod
    def from_pretrained(
        cls, export_dir: str, device: str | torch.device | None = None
    ) -> VisualModel:
        """Load an exported model.

        Args:
            export_dir: folder or URL that `smalti export` wrote.
            device: default: CUDA if there is a GPU, else CPU.

        Raises:
            ArtifactError: if the folder is not a complete export.
        """
        if not exists(join(export_dir, SETTINGS)):
            raise ArtifactError(
                f"{export_dir} has no {SETTINGS}, so it is not an exported model. Give the folder "
                "that `smalti export` wrote."
            )
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        settings = read_json(join(export_dir, SETTINGS))
        with local_copy(export_dir) as folder:
            causal_lm, hf_tokenizer = _load(folder, export_dir)
            lm: CausalLM = causal_lm
            if "visual_side" in settings:
                vocabulary = VisualVocabulary.from_tokenizer(hf_tokenizer)
                lm = load_side(folder, causal_lm, vocabulary, settings["visual_side"])
            module: nn.Module = lm
            module.to(target)
            visual_tokenizer_dir = os.path.join(folder, settings["visual_tokenizer"])
            model = cls(lm, hf_tokenizer, settings, visual_tokenizer_dir)
            if exists(join(folder, "bridge")):
                bridge, codes_VC = load_bridge(os.path.join(folder, "bridge"))
                model._bridge = bridge.to(target), codes_VC
            if folder != export_dir:
                model.visual_tokenizer  # noqa: B018 (the local copy of a URL is deleted after this)
        return model

    @property
    def device(self) -> torch.device:
        """The device of the language model."""
        return next(self.lm.parameters()).device

    @property
    def num_tokens(self) -> int:
        """T, tokens per image."""
        return int(self.settings["tokens"])

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of a token's codes: () or (2, R)."""
        return tuple(self.settings.get("code_shape", ()))

    @cached_property
    def visual_tokenizer(self) -> VisualTokenizer:
        """The visual tokenizer of the export."""
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
        """Draw the codes of one image per prompt: int64 (B, T, *code_shape), on the CPU.

        Args:
            prompts: captions; an empty one draws without a condition.
            cfg: scale of classifier-free guidance; 1: none.
            temperature: 0 takes the best code.
            top_k: number of codes to draw from; 0: all.
            top_p: probability that the codes to draw from must reach; 1: all.
            seed: with a prompt's place in the list, it decides the prompt's random numbers, at any
                batch size.
            batch_size: prompts per batch.
            compile: see `smalti.mllm.generation.draw`.
        """
        sampling = Sampling(cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p)
        ids = [self.text.caption_prompt(prompt) for prompt in prompts]
        seeds = [sample_seed(seed, index) for index in range(len(ids))]
        if self.code_shape:
            assert isinstance(self.lm, DepthModel)
            drawing = partial(draw_places, self.lm)
        else:
            drawing = partial(draw, self.lm, self.vocabulary)
        one = partial(drawing, tokens=self.num_tokens, sampling=sampling, compile=compile)
        drawn = [one(ids[rows], seed=seeds[rows]) for rows in _batches(len(ids), batch_size)]
        if not drawn:
            return torch.empty((0, self.num_tokens, *self.code_shape), dtype=torch.int64)
        return torch.cat(drawn)

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
        """Draw one RGB picture per prompt; the arguments are those of `draw_codes`.

        Raises:
            ConfigError: if the model cannot decode codes to pictures (`cannot_draw`).
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
        seeds = [sample_seed(seed, index) for index in range(len(codes_BT))]
        pictures: list[Image.Image] = []
        for rows in _batches(len(codes_BT), batch_size):
            pictures += self.decode(codes_BT[rows], seeds[rows])
        return pictures

    def ask(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 32,
    ) -> list[str]:
        """Answer one question about each picture.

        Args:
            images: B pictures of any size and mode.
            questions: B questions.
            max_new_tokens: most tokens of an answer.
            batch_size: pictures per batch.

        Raises:
            VocabularyError: if there is not one question per image.
        """
        _check_count(len(images), questions)
        answers: list[str] = []
        for rows in _batches(len(images), batch_size):
            codes_BT = self.encode(images[rows])
            answers += self.ask_codes(codes_BT, questions[rows], max_new_tokens, batch_size)
        return answers

    def ask_codes(
        self,
        codes_BT: Tensor,
        questions: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 32,
    ) -> list[str]:
        """As `ask`, from the codes of images, int (B, T, *code_shape).

        Questions of similar length share a batch.
        """
        _check_count(len(codes_BT), questions)
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        answers = [""] * len(questions)
        for rows in _batches(len(order), batch_size):
            chosen = order[rows]
            found = answer(
                self.lm,
                self.hf_tokenizer,
                self.vocabulary,
                codes_BT[chosen],
                [questions[i] for i in chosen],
                max_new_tokens,
            )
            for i, text in zip(chosen, found, strict=True):
                answers[i] = text
        return answers

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Codes of pictures of any size and mode: int64 (B, T, *code_shape).

        Pictures are resized and centre-cropped as in training.
        """
        size = int(self.settings["image_size"])
        pixels = np.stack([to_pixels(_png(image), size) for image in images])
        pixels_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        return self.visual_tokenizer.encode(pixels_BCHW.to(self.device))

    @cached_property
    def cannot_draw(self) -> str | None:
        """Why the model cannot decode codes to pictures; None if it can."""
        if self._has_decoder:
            return None
        if self._bridge is None:
            return str(self.visual_tokenizer.no_decoder)
        return None if find_spec("diffusers") else NEEDS_DIFFUSERS

    @property
    def _has_decoder(self) -> bool:
        return getattr(self.visual_tokenizer, "has_decoder", True)

    @cached_property
    def _diffuser(self) -> Diffuser:
        """The diffusion decoder of the export's bridge."""
        assert self._bridge is not None
        return Diffuser(self._bridge[0].section.decoder, self.device)

    @torch.no_grad()
    def decode(self, codes_BT: Tensor, seeds: Sequence[int] | None = None) -> list[Image.Image]:
        """Decode codes to pictures.

        Args:
            codes_BT: codes (B, T, *code_shape).
            seeds: one per picture, for a diffusion decoder (default: 0 … B − 1).
        """
        if not self._has_decoder and self._bridge is not None:
            return self._diffuse(codes_BT, range(len(codes_BT)) if seeds is None else seeds)
        pixels_BCHW = self.visual_tokenizer.decode(codes_BT.to(self.device)).float().cpu()
        bytes_BCHW = pixels_BCHW.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(array) for array in bytes_BCHW.permute(0, 2, 3, 1).numpy()]

    def _diffuse(self, codes_BT: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures of the diffusion decoder."""
        if not len(seeds):
            return []
        assert self._bridge is not None
        bridge, codes_VC = self._bridge
        given = bridge(codes_VC[codes_BT.cpu()].to(self.device))
        return self._diffuser.draw(given, seeds, bridge.section.steps, bridge.section.guidance)


def _load(folder: str, export_dir: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the language model, in eval mode, and its tokenizer.

    Raises:
        ArtifactError: if they are missing, torn or incomplete.
    """
    try:
        lm, missing = load_causal_lm(folder)
        hf_tokenizer = AutoTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [repr(error)])[0].rstrip(".")
        raise ArtifactError(
            f"{export_dir} holds no complete language model ({reason}). Export it again."
        ) from error
    if missing:
        raise ArtifactError(
            f"{export_dir} lacks {len(missing)} weights of its language model, the first "
            f"{missing[0]}. Export it again."
        )
    return lm.eval(), hf_tokenizer


def _batches(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, start + size)


def _check_count(images: int, questions: Sequence[str]) -> None:
    if images != len(questions):
        raise VocabularyError(
            f"{images} images but {len(questions)} questions: give one question for each image."
        )


def _png(image: Image.Image) -> bytes:
    """Lossless bytes of a picture, so that pictures and files are decoded by the same code."""
    as_png = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
    stream = io.BytesIO()
    image.save(stream, format="PNG" if as_png else "TIFF")
    return stream.getvalue()
