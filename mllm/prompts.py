"""The text around images, written once: training, generation and export all read it here.

    caption → image     [bos] caption <start_of_image> IMG… <end_of_image> eos      (no caption: the unconditional image)
    image → caption     [bos] <und_start> IMG… <und_end> caption eos
    image + questions   [bos] <und_start> IMG… <und_end> question ⏎ answer ⏎ question ⏎ answer ⏎ … eos
    text                [bos] text eos

bos is left out where the tokenizer has none (Qwen2.5). Each piece of text is tokenized by itself,
so that a prompt has the same ids in training and at inference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from smalti.mllm.vocabulary import VisualVocabulary

UNCONDITIONAL = ""
"""The prompt of an unconditional image, as in classifier-free guidance: no caption at all."""
LINE_END = "\n"
"""Stands after a question and after its answer."""


def clean(text: str | None) -> str:
    """Text on one line: every run of white space becomes one space; None becomes the empty text."""
    return " ".join(text.split()) if text else ""


class TextEncoder:
    """Text to ids with one tokenizer, never yielding a special, added or visual token.

    Captions and questions come from strangers: one that contains `<IMG_3>` or `<|im_end|>`
    literally must stay text, so such a piece is broken up by a space after its first character.
    """

    def __init__(self, hf_tokenizer: Any, vocabulary: VisualVocabulary) -> None:
        self.hf_tokenizer = hf_tokenizer
        self.vocabulary = vocabulary
        self.reserved = {int(i) for i in hf_tokenizer.added_tokens_decoder} | {
            int(i) for i in hf_tokenizer.all_special_ids
        }
        self.line_end = self._ids(LINE_END)
        self._cached = lru_cache(maxsize=65_536)(self._encode)

    def __call__(self, text: str) -> list[int]:
        """Ids of one piece of text (already on one line); a text without words gives []."""
        return list(self._cached(text)) if text else []

    def caption_prompt(self, caption: str | None) -> list[int]:
        """Ids up to and with `<start_of_image>`: what is given when an image is to be drawn."""
        return [*self.begin(), *self(clean(caption)), self.vocabulary.boi]

    def question_prompt(self, question: str) -> list[int]:
        """Ids of a question and its line end: what is given, after an image, when an answer is
        wanted.
        """
        return [*self(clean(question)), *self.line_end]

    def begin(self) -> list[int]:
        """`[bos]`, or nothing where the tokenizer has no such token."""
        return [] if self.vocabulary.bos is None else [self.vocabulary.bos]

    def _ids(self, text: str) -> list[int]:
        return self.hf_tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self._ids(text)
        while (hit := next((i for i in ids if i in self.reserved), None)) is not None:
            token = self.hf_tokenizer.convert_ids_to_tokens(hit)
            broken = text.replace(token, f"{token[:1]} {token[1:]}")
            if (
                broken == text or token in broken
            ):  # not its own literal (an unknown character), or one that no space breaks
                return tuple(i for i in ids if i not in self.reserved)
            text, ids = broken, self._ids(broken)
        return tuple(ids)
