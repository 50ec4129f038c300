"""The flat vocabulary of a unified model: text tokens first, then delimiters, then one token for
each visual code.

    [0, num_text)                       the language model's own tokens, unchanged (chat tokens included)
    next                                the delimiters below that its tokenizer did not have yet
    [first_visual, first_visual + K)    `<IMG_0>` … `<IMG_{K-1}>`: code k is token first_visual + k

An image to be drawn stands between `<start_of_image>` and `<end_of_image>`; an image to be
understood between `<und_start>` and `<und_end>`. SemHiTok (arXiv 2503.06764) uses
`<|im_start|>`/`<|im_end|>` for the latter; those are Qwen's chat markers, so this project has
delimiters of its own (any chat template goes on working).

Models such as Qwen2.5 pad their embedding matrix beyond the tokenizer's length. Ids follow the
tokenizer, so the first new tokens take over padding rows; the matrix grows by the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.errors import VocabularyError
from tokenizers import AddedToken

IMAGE_START = "<start_of_image>"
IMAGE_END = "<end_of_image>"
UNDERSTAND_START = "<und_start>"
UNDERSTAND_END = "<und_end>"
DELIMITERS = (IMAGE_START, IMAGE_END, UNDERSTAND_START, UNDERSTAND_END)


def visual_token(code: int) -> str:
    """The token that stands for one visual code, such as `<IMG_7>`."""
    return f"<IMG_{code}>"


@dataclass(frozen=True)
class VisualVocabulary:
    """Where text, delimiters and visual codes lie among the ids of one tokenizer.

    `bos` is None where there is none.
    """

    num_text: int
    first_visual: int
    num_codes: int
    boi: int
    eoi: int
    und_start: int
    und_end: int
    eos: int
    pad: int
    bos: int | None

    @property
    def size(self) -> int:
        """Ids in use: one more than the last visual id.

        A model needs at least as many head rows.
        """
        return self.first_visual + self.num_codes

    def to_ids(self, codes: Tensor, source: str = "these codes") -> Tensor:
        """Token ids of codes: int64, same shape.

        Codes outside [0, num_codes) raise VocabularyError.
        """
        self.check_codes(codes, source)
        return codes.to(torch.int64) + self.first_visual

    def to_codes(self, ids: Tensor) -> Tensor:
        """Codes of visual token ids: int64, same shape.

        Ids that are not visual raise VocabularyError.
        """
        codes = ids.to(torch.int64) - self.first_visual
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.num_codes):
            bad = ids[~self.is_visual(ids)].flatten()[0]
            raise VocabularyError(
                f"Token id {int(bad)} is not a visual code: those are ids {self.first_visual} to {self.size - 1} here."
            )
        return codes

    def is_visual(self, ids: Tensor) -> Tensor:
        """True where an id is a visual code: bool, same shape."""
        return (ids >= self.first_visual) & (ids < self.size)

    def check_codes(self, codes: Tensor, source: str = "these codes") -> None:
        """Raise VocabularyError, naming `source`, unless every code lies in [0, num_codes)."""
        if not codes.numel():
            return
        low, high = int(codes.min()), int(codes.max())
        if low < 0:
            raise VocabularyError(
                f"{source} holds the visual id {low}; visual ids start at 0. Tokenize again."
            )
        if high >= self.num_codes:
            raise VocabularyError(
                f"{source} holds visual ids up to {high}, but this model has {self.num_codes} visual codes. Tokenize "
                f"again with the tokenizer that this model was built for, or build the model with that tokenizer."
            )

    @classmethod
    def extend(cls, hf_tokenizer: Any, num_codes: int) -> VisualVocabulary:
        """Add the delimiters and `num_codes` visual tokens to a Hugging Face tokenizer, in place;
        its layout comes back.

        Delimiters are special tokens; visual tokens are not, so that `decode(…,
        skip_special_tokens=True)` keeps the codes of an image. A tokenizer without a padding token
        gets its end token as one. A tokenizer that has visual tokens already, or no end-of-sequence
        token, raises VocabularyError.
        """
        if num_codes < 1:
            raise VocabularyError(
                f"A visual vocabulary needs at least 1 code, but {num_codes} were asked for."
            )
        if _token_id(hf_tokenizer, visual_token(0)) is not None:
            raise VocabularyError(
                "This tokenizer has visual tokens (<IMG_0>) already. Start from the language model as published, "
                "or read its layout with VisualVocabulary.from_tokenizer."
            )
        _require_eos(hf_tokenizer)
        if hf_tokenizer.pad_token_id is None:
            hf_tokenizer.pad_token = hf_tokenizer.eos_token
        absent = [name for name in DELIMITERS if _token_id(hf_tokenizer, name) is None]
        hf_tokenizer.add_tokens(
            [AddedToken(name, normalized=False, special=True) for name in absent],
            special_tokens=True,
        )
        hf_tokenizer.add_tokens(
            [AddedToken(visual_token(i), normalized=False) for i in range(num_codes)]
        )
        vocabulary = cls.from_tokenizer(hf_tokenizer)
        if vocabulary.num_codes != num_codes:
            raise VocabularyError(
                f"The tokenizer took {vocabulary.num_codes} of {num_codes} visual tokens as consecutive ids; "
                f"{type(hf_tokenizer).__name__} cannot be extended this way. Use a fast (tokenizers-backed) tokenizer."
            )
        return vocabulary

    @classmethod
    def from_tokenizer(cls, hf_tokenizer: Any) -> VisualVocabulary:
        """The layout of a tokenizer that `extend` has extended, now or in an earlier process."""
        first_visual = _token_id(hf_tokenizer, visual_token(0))
        ids = {name: _token_id(hf_tokenizer, name) for name in DELIMITERS}
        missing = [
            name for name, found in {visual_token(0): first_visual, **ids}.items() if found is None
        ]
        if missing or first_visual is None:
            raise VocabularyError(
                f"This tokenizer has no {', '.join(missing)}: it is not one of a unified model. "
                f"Load the folder that `smalti mllm` or `smalti export` wrote."
            )
        _require_eos(hf_tokenizer)
        eos = int(hf_tokenizer.eos_token_id)
        pad = hf_tokenizer.pad_token_id
        bos = hf_tokenizer.bos_token_id
        return cls(
            num_text=_block_start(first_visual, set(ids.values())),
            first_visual=first_visual,
            num_codes=_count_codes(hf_tokenizer, first_visual),
            boi=int(ids[IMAGE_START]),  # type: ignore[arg-type]
            eoi=int(ids[IMAGE_END]),  # type: ignore[arg-type]
            und_start=int(ids[UNDERSTAND_START]),  # type: ignore[arg-type]
            und_end=int(ids[UNDERSTAND_END]),  # type: ignore[arg-type]
            eos=eos,
            pad=eos if pad is None else int(pad),
            bos=None if bos is None else int(bos),
        )


def _require_eos(hf_tokenizer: Any) -> None:
    if hf_tokenizer.eos_token_id is None:
        raise VocabularyError(
            "This tokenizer has no end-of-sequence token, so a model could not learn where to stop. "
            "Set `eos_token` in its tokenizer_config.json."
        )


def _token_id(hf_tokenizer: Any, token: str) -> int | None:
    """Id of a whole token, or None (an unknown token comes back from `transformers` as None or the
    unk id).
    """
    found = hf_tokenizer.convert_tokens_to_ids(token)
    if found is None or hf_tokenizer.convert_ids_to_tokens(found) != token:
        return None
    return int(found)


def _count_codes(hf_tokenizer: Any, first_visual: int) -> int:
    """How many visual tokens follow `first_visual` without a gap."""
    most = len(hf_tokenizer) - first_visual
    tokens: Iterable[str | None] = hf_tokenizer.convert_ids_to_tokens(
        range(first_visual, first_visual + most)
    )
    count = 0
    for token in tokens:
        if token != visual_token(count):
            break
        count += 1
    return count


def _block_start(first_visual: int, delimiters: set[int | None]) -> int:
    """First id of the delimiters that stand directly before the visual ids."""
    start = first_visual
    while start - 1 in delimiters:
        start -= 1
    return start
