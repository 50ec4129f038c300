"""The text around images, for training, generation and export.

    caption → image    [bos] caption <start_of_image> IMG… <end_of_image> eos
    image → caption    [bos] <und_start> IMG… <und_end> caption eos
    image + questions  [bos] <und_start> IMG… <und_end> question ⏎ answer ⏎ … eos
    text               [bos] text eos

Without a caption the image is unconditional; there may be any number of questions. bos is left out
if the tokenizer has none (Qwen2.5). Each piece of text is tokenized by itself, so that a prompt has
the same ids in training and at inference.
"""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from smalti.mllm.vocabulary import VisualVocabulary

UNCONDITIONAL = ""
"""The prompt of an unconditional image (classifier-free guidance): no caption."""
LINE_END = "\n"
"""Comes after a question and after its answer."""


def clean(text: str | None) -> str:
    """The text on one line; None becomes the empty text.

    Every run of white space becomes one space.
    """
    return " ".join(text.split()) if text else ""


class TextEncoder:
    """Encodes text to ids, never to special, added or visual tokens.

    Captions and questions are untrusted: one that contains `<IMG_3>` or `<|im_end|>` literally must
    stay text, so a space is inserted after the first character of such a piece.
    """

    def __init__(self, hf_tokenizer: PreTrainedTokenizerBase, vocabulary: VisualVocabulary) -> None:
        self.hf_tokenizer = hf_tokenizer
        self.vocabulary = vocabulary
        self.reserved = {int(i) for i in hf_tokenizer.added_tokens_decoder} | {
            int(i) for i in hf_tokenizer.all_special_ids
        }
        self.line_end = self._ids(LINE_END)
        self._cached = lru_cache(maxsize=65_536)(self._encode)

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that is on one line; [] for an empty one."""
        return list(self._cached(text)) if text else []

    def caption_prompt(self, caption: str | None) -> list[int]:
        """The prompt that draws an image: ids up to and with `<start_of_image>`."""
        return [*self.begin(), *self(clean(caption)), self.vocabulary.boi]

    def question_prompt(self, question: str) -> list[int]:
        """The prompt, after an image, for an answer: the question and its line end."""
        return [*self(clean(question)), *self.line_end]

    def begin(self) -> list[int]:
        """`[bos]`, or [] if the tokenizer has no such token."""
        return [] if self.vocabulary.bos is None else [self.vocabulary.bos]

    def _ids(self, text: str) -> list[int]:
        return self.hf_tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self._ids(text)
        while (hit := next((i for i in ids if i in self.reserved), None)) is not None:
            token = self.hf_tokenizer.convert_ids_to_tokens(hit)
            assert isinstance(token, str)
            broken = text.replace(token, f"{token[:1]} {token[1:]}")
            # not the token's text (an unknown character), or a space does not break it
            if broken == text or token in broken:
                return tuple(i for i in ids if i not in self.reserved)
            text = broken
            ids = self._ids(broken)
        return tuple(ids)
