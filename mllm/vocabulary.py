"""The flat vocabulary of a unified model: text tokens, delimiters, visual codes.

    [0, num_text)                       the language model's own tokens, unchanged (chat tokens too)
    next                                the delimiters below that its tokenizer lacked
    [first_visual, first_visual + K)    `<IMG_0>` … `<IMG_{K-1}>`: code k is token first_visual + k

An image to be drawn is between `<start_of_image>` and `<end_of_image>`, an image to be understood
between `<und_start>` and `<und_end>`. SemHiTok (arXiv 2503.06764) uses `<|im_start|>`/`<|im_end|>`
for the latter; those are Qwen's chat markers, so this project has delimiters of its own: any chat
template still works.

Models such as Qwen2.5 pad their embedding matrix beyond the tokenizer's length. Ids follow the
tokenizer, so the first new tokens use padding rows, and the matrix grows by the remaining ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smalti.errors import VocabularyError
from tokenizers import AddedToken

IMAGE_START = "<start_of_image>"
IMAGE_END = "<end_of_image>"
UNDERSTAND_START = "<und_start>"
UNDERSTAND_END = "<und_end>"
DELIMITERS = (IMAGE_START, IMAGE_END, UNDERSTAND_START, UNDERSTAND_END)


def visual_token(code: int) -> str:
    """The token of a visual code, such as `<IMG_7>`."""
    return f"<IMG_{code}>"


@dataclass(frozen=True)
class VisualVocabulary:
    """Ids of text, delimiters and visual codes of one tokenizer.

    `bos` is None if the tokenizer has none.
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
        """Number of ids: one more than the last visual id.

        A model's head needs at least as many rows.
        """
        return self.first_visual + self.num_codes

    def to_ids(self, codes: Tensor, source: str = "these codes") -> Tensor:
        """Token ids of codes: int64, same shape.

        Args:
            codes: integers of any shape.
            source: where they come from, for the error.

        Raises:
            VocabularyError: if a code is outside [0, num_codes).
        """
        self.check_codes(codes, source)
        return codes.to(torch.int64) + self.first_visual

    def to_codes(self, ids: Tensor) -> Tensor:
        """Codes of visual token ids: int64, same shape.

        Raises:
            VocabularyError: if an id is not a visual one.
        """
        codes = ids.to(torch.int64) - self.first_visual
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.num_codes):
            bad = ids[~self.is_visual(ids)].flatten()[0]
            raise VocabularyError(
                f"Token id {int(bad)} is not a visual code: those have ids {self.first_visual} to "
                f"{self.size - 1} in this vocabulary."
            )
        return codes

    def is_visual(self, ids: Tensor) -> Tensor:
        """Whether each id is a visual code: bool, same shape."""
        return (ids >= self.first_visual) & (ids < self.size)

    def check_codes(self, codes: Tensor, source: str = "these codes") -> None:
        """Raise VocabularyError, naming `source`, unless all codes are in [0, num_codes)."""
        if not codes.numel():
            return
        low = int(codes.min())
        high = int(codes.max())
        if low < 0:
            raise VocabularyError(
                f"{source} holds the visual id {low}; visual ids start at 0. Tokenize again."
            )
        if high >= self.num_codes:
            raise VocabularyError(
                f"{source} holds visual ids up to {high}, but this model has {self.num_codes} "
                "visual codes. Tokenize again with the tokenizer that this model was built for, or "
                "build the model with that tokenizer."
            )

    @classmethod
    def extend(cls, hf_tokenizer: PreTrainedTokenizerBase, num_codes: int) -> VisualVocabulary:
        """Add delimiters and visual tokens to a Hugging Face tokenizer, in place.

        Delimiters are special tokens; visual tokens are not, so that `decode(…,
        skip_special_tokens=True)` keeps the codes of an image. A tokenizer without a padding token
        gets its end token as one.

        Args:
            hf_tokenizer: a fast tokenizer.
            num_codes: number of visual tokens, at least 1.

        Returns:
            The layout of the extended tokenizer.

        Raises:
            VocabularyError: if the tokenizer has visual tokens already, has no end-of-sequence
                token, or cannot be extended by consecutive ids.
        """
        if num_codes < 1:
            raise VocabularyError(
                f"A visual vocabulary needs at least 1 code, but num_codes is {num_codes}."
            )
        if _token_id(hf_tokenizer, visual_token(0)) is not None:
            raise VocabularyError(
                "This tokenizer has visual tokens (<IMG_0>) already. Start from the language model "
                "as published, or read its layout with VisualVocabulary.from_tokenizer."
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
                f"The tokenizer took {vocabulary.num_codes} of {num_codes} visual tokens as "
                f"consecutive ids; {type(hf_tokenizer).__name__} cannot be extended this way. Use "
                "a fast (tokenizers-backed) tokenizer."
            )
        return vocabulary

    @classmethod
    def from_tokenizer(cls, hf_tokenizer: PreTrainedTokenizerBase) -> VisualVocabulary:
        """Read the layout of a tokenizer that `extend` has extended.

        Raises:
            VocabularyError: if a delimiter, the visual tokens or the end-of-sequence token are
                missing.
        """
        found = {name: _token_id(hf_tokenizer, name) for name in (visual_token(0), *DELIMITERS)}
        ids = {name: number for name, number in found.items() if number is not None}
        if len(ids) < len(found):
            missing = [name for name in found if name not in ids]
            raise VocabularyError(
                f"This tokenizer has no {', '.join(missing)}: it is not one of a unified model. "
                "Load the folder that `smalti mllm` or `smalti export` wrote."
            )
        _require_eos(hf_tokenizer)
        first_visual = ids[visual_token(0)]
        eos = int(hf_tokenizer.eos_token_id)
        pad = hf_tokenizer.pad_token_id
        bos = hf_tokenizer.bos_token_id
        return cls(
            num_text=_block_start(first_visual, {ids[name] for name in DELIMITERS}),
            first_visual=first_visual,
            num_codes=_count_codes(hf_tokenizer, first_visual),
            boi=ids[IMAGE_START],
            eoi=ids[IMAGE_END],
            und_start=ids[UNDERSTAND_START],
            und_end=ids[UNDERSTAND_END],
            eos=eos,
            pad=eos if pad is None else int(pad),
            bos=None if bos is None else int(bos),
        )


def _require_eos(hf_tokenizer: PreTrainedTokenizerBase) -> None:
    if hf_tokenizer.eos_token_id is None:
        raise VocabularyError(
            "This tokenizer has no end-of-sequence token, so a model could not learn where to stop."
            " Set `eos_token` in its tokenizer_config.json."
        )


def _token_id(hf_tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Id of a token; None if it is unknown (transformers gives None or the unk id)."""
    found = hf_tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or hf_tokenizer.convert_ids_to_tokens(found) != token:
        return None
    return found


def _count_codes(hf_tokenizer: PreTrainedTokenizerBase, first_visual: int) -> int:
    """Number of visual tokens from `first_visual` on, without a gap."""
    tokens = hf_tokenizer.convert_ids_to_tokens(list(range(first_visual, len(hf_tokenizer))))
    count = 0
    for token in tokens:
        if token != visual_token(count):
            break
        count += 1
    return count


def _block_start(first_visual: int, delimiters: set[int]) -> int:
    """First id of the delimiters directly before the visual ids."""
    start = first_visual
    while start - 1 in delimiters:
        start -= 1
    return start
