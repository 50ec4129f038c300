"""Images from text, and answers about images, with one language model.

The model is a unified one, or its plain export.

Axes: B images, R rows of the batch (B, or 2B with guidance), L prompt positions, T codes per image,
K visual codes, V text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smalti.mllm.decoder import CausalLM, Decoder
from smalti.mllm.language_model import end_tokens
from smalti.mllm.model import UnifiedModel
from smalti.mllm.prompts import LINE_END, TextEncoder
from smalti.mllm.sampling import choose, guidance, sample_uniform, seeds_of
from smalti.mllm.vocabulary import VisualVocabulary

if TYPE_CHECKING:
    from smalti.schema import Sampling


@torch.no_grad()
def draw(
    lm: CausalLM,
    vocabulary: VisualVocabulary,
    prompts_ids: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling,
    seed: int | Sequence[int] = 0,
    unconditional_ids: Sequence[int] | None = None,
    compile: str | None = None,
) -> Tensor:
    """Draw the codes of one image per prompt: int64 (B, tokens) in [0, num_codes), on the CPU.

    Guidance, ℓ = ℓ_u + s (ℓ_c − ℓ_u), comes before temperature, top-k and top-p. Both halves run in
    one batch with one key–value cache, and the head is applied to the visual rows only. A sample's
    random numbers depend on its seed alone, so it is the same in any batch (up to rounding in the
    network).

    Args:
        lm: a unified model or its export.
        vocabulary: layout of the flat vocabulary.
        prompts_ids: each ends with `<start_of_image>` (`TextEncoder.caption_prompt`).
        tokens: T.
        sampling: `cfg` 1 runs no unconditional half; `temperature` 0 takes the best code.
        seed: one number, from which each sample of the batch gets its own, or one per sample.
        unconditional_ids: the unconditional prompt; None: no caption at all.
        compile: backend of `torch.compile` for the steps after the prompt, None without.
            "inductor" records CUDA graphs on a GPU, which pays if many images are drawn in batches
            of one size. Caches of the last few shapes are kept with the model.
    """
    if not prompts_ids:
        return torch.empty((0, tokens), dtype=torch.int64)
    guided = sampling.cfg != 1.0
    rows = prompt_rows(vocabulary, prompts_ids, guided, unconditional_ids)
    decoder = Decoder(lm, rows, vocabulary.pad, tokens - 1, compile)
    head = decoder.head_rows(vocabulary.first_visual, vocabulary.num_codes)
    uniform_BT = sample_uniform(seeds_of(seed, len(prompts_ids)), tokens)
    codes_BT = torch.empty((len(prompts_ids), tokens), dtype=torch.int64)
    for t in range(tokens):
        logits_BK = guidance(head(decoder.last_RH).float(), sampling.cfg)
        codes_B = choose(logits_BK, sampling, uniform_BT[:, t].to(logits_BK.device))
        codes_BT[:, t] = codes_B.cpu()
        if t + 1 < tokens:
            ids_B = codes_B + vocabulary.first_visual
            decoder.step(torch.cat([ids_B, ids_B]) if guided else ids_B)
    return codes_BT


def prompt_rows(
    vocabulary: VisualVocabulary,
    prompts_ids: Sequence[Sequence[int]],
    guided: bool,
    unconditional_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """The prompts; with guidance followed by as many unconditional ones."""
    rows = [list(prompt) for prompt in prompts_ids]
    if not guided:
        return rows
    if unconditional_ids is None:
        begin = [] if vocabulary.bos is None else [vocabulary.bos]
        unconditional_ids = [*begin, vocabulary.boi]
    return rows + [list(unconditional_ids)] * len(prompts_ids)


@torch.no_grad()
def answer(
    lm: CausalLM,
    hf_tokenizer: PreTrainedTokenizerBase,
    vocabulary: VisualVocabulary,
    codes_BT: Tensor,
    questions: Sequence[str],
    max_new_tokens: int = 32,
) -> list[str]:
    """Answer one question about each image, greedily.

    Only text ids are generated. A row ends at an end token or at a line end.

    Args:
        lm: a unified model or its export.
        hf_tokenizer: the model's tokenizer.
        vocabulary: layout of the flat vocabulary.
        codes_BT: codes of the images, (B, T) or (B, T, 2, R).
        questions: B questions.
        max_new_tokens: most tokens of an answer.

    Returns:
        B answers, each on one line.

    Raises:
        ValueError: if there is not one question per image.
        VocabularyError: if a code is outside the vocabulary.
    """
    if len(codes_BT) != len(questions):
        raise ValueError(
            f"{len(codes_BT)} images but {len(questions)} questions; give one question per image."
        )
    if not len(questions):
        return []
    text = TextEncoder(hf_tokenizer, vocabulary)
    several = codes_BT.ndim > 2  # the model embeds the codes of a place
    places_BT = torch.zeros_like(codes_BT[:, :, 0, 0]) if several else codes_BT
    rows = _question_rows(text, places_BT, questions)
    codes = codes_BT.flatten(0, 1) if several else None
    decoder = Decoder(lm, rows, vocabulary.pad, max_new_tokens, codes=codes)
    answers = _greedy(decoder, text, end_ids(lm, vocabulary), max_new_tokens)
    return [_decoded(hf_tokenizer, ids).split(LINE_END)[0].strip() for ids in answers]


def _question_rows(
    text: TextEncoder, codes_BT: Tensor, questions: Sequence[str]
) -> list[list[int]]:
    """Prompts of an image and its question."""
    vocabulary = text.vocabulary
    images = vocabulary.to_ids(codes_BT).tolist()
    return [
        [
            *text.begin(),
            vocabulary.und_start,
            *image,
            vocabulary.und_end,
            *text.question_prompt(question),
        ]
        for image, question in zip(images, questions, strict=True)
    ]


def _greedy(
    decoder: Decoder, text: TextEncoder, ends: set[int], max_new_tokens: int
) -> list[list[int]]:
    """The best text ids of each row, up to an end token or with its first line end."""
    num_text = text.vocabulary.num_text
    head = decoder.head_rows(0, num_text)
    banned = sorted(i for i in text.reserved - ends if i < num_text)
    banned_N = torch.tensor(banned, dtype=torch.int64, device=decoder.device)
    answers: list[list[int]] = [[] for _ in range(len(decoder.last_RH))]
    running = set(range(len(answers)))
    for _ in range(max_new_tokens):
        logits_BV = head(decoder.last_RH).float().index_fill_(1, banned_N, -torch.inf)
        ids_B = logits_BV.argmax(-1)
        ids = ids_B.tolist()
        for b in sorted(running):
            if ids[b] not in ends:
                answers[b].append(ids[b])
            if ids[b] in ends or LINE_END in _decoded(text.hf_tokenizer, [ids[b]]):
                running.discard(b)
        if not running:
            break
        decoder.step(ids_B)
    return answers


def _decoded(hf_tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = hf_tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def end_ids(lm: CausalLM, vocabulary: VisualVocabulary) -> set[int]:
    """Ids that end a text: the tokenizer's end token, and the generation config's."""
    causal_lm = lm.lm if isinstance(lm, UnifiedModel) else lm
    return {vocabulary.eos, *end_tokens(causal_lm)}
