"""Images from text and answers about images, with one language model: a unified model or its plain
export.

Axes: B sequences, R rows of the batch (B, or 2B with guidance), L prompt positions, T codes, K
visual codes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from smalti.errors import VocabularyError
from smalti.mllm.cache import as_columns, few_row_linears, make_cache
from smalti.mllm.model import UnifiedModel
from smalti.mllm.prompts import LINE_END, TextEncoder
from smalti.mllm.vocabulary import VisualVocabulary

if TYPE_CHECKING:
    from smalti.schema import Sampling

STEP = 64
"""Positions of a static cache are a multiple of it, so that prompts of about one length share what
was compiled.
"""
SHAPES = 4
"""Static caches that are kept."""


@torch.no_grad()
def draw(
    lm: nn.Module,
    vocabulary: VisualVocabulary,
    prompts_ids: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling,
    seed: int | Sequence[int] = 0,
    unconditional_ids: Sequence[int] | None = None,
    compile: str | None = None,
) -> Tensor:
    """Codes of one image a prompt: int64 (B, tokens) in [0, num_codes), on the CPU.

    prompts_ids: each ends with `<start_of_image>` (`TextEncoder.caption_prompt`). Guidance, ℓ = ℓ_u
    + s (ℓ_c − ℓ_u), comes before temperature, top-k and top-p; both halves run in one batch with
    one key–value cache, and the head is applied to the visual rows only. `cfg` 1 runs no
    unconditional half; `temperature` 0 takes the best code. seed: one number, from which each
    sample of the batch gets its own, or the samples' own. A sample's random numbers depend on its
    seed alone, so it comes out the same in any batch (up to rounding in the network). compile: the
    backend of `torch.compile` for the steps after the prompt, None without; "inductor" makes CUDA
    graphs on a GPU, which pays where many images are drawn in batches of one size. Caches of the
    last few shapes stay with the model.
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
    """The prompts, and with guidance as many times the unconditional one behind them."""
    rows = [list(prompt) for prompt in prompts_ids]
    if guided:
        begin = [] if vocabulary.bos is None else [vocabulary.bos]
        unconditional = (
            [*begin, vocabulary.boi] if unconditional_ids is None else list(unconditional_ids)
        )
        rows += [unconditional] * len(prompts_ids)
    return rows


def guidance(logits_RK: Tensor, cfg: float) -> Tensor:
    """ℓ_u + s (ℓ_c − ℓ_u), (B, K), of conditional rows above unconditional ones; with s = 1, where
    there are none, as given.
    """
    if cfg == 1.0:
        return logits_RK
    conditional_BK, unconditional_BK = logits_RK.chunk(2)
    return unconditional_BK + cfg * (conditional_BK - unconditional_BK)


@torch.no_grad()
def answer(
    lm: nn.Module,
    hf_tokenizer: Any,
    vocabulary: VisualVocabulary,
    codes_BT: Tensor,
    questions: Sequence[str],
    max_new_tokens: int = 32,
) -> list[str]:
    """The greedy answer to one question about each image (B of both), as text on one line.

    Codes: (B, T), or (B, T, 2, R).

    Only text ids can come out. A row ends at the end token or at a line's end.
    """
    if len(codes_BT) != len(questions):
        raise ValueError(
            f"{len(codes_BT)} images but {len(questions)} questions; give one question an image."
        )
    if not len(questions):
        return []
    text = TextEncoder(hf_tokenizer, vocabulary)
    several = codes_BT.ndim > 2  # codes of a place: the model embeds them
    images = vocabulary.to_ids(
        torch.zeros_like(codes_BT[:, :, 0, 0]) if several else codes_BT
    ).tolist()
    rows = [
        [
            *text.begin(),
            vocabulary.und_start,
            *image,
            vocabulary.und_end,
            *text.question_prompt(question),
        ]
        for image, question in zip(images, questions, strict=True)
    ]
    ends = end_ids(lm, vocabulary)
    decoder = Decoder(
        lm, rows, vocabulary.pad, max_new_tokens, codes=codes_BT.flatten(0, 1) if several else None
    )
    head = decoder.head_rows(0, vocabulary.num_text)
    banned = torch.tensor(
        sorted(i for i in text.reserved - ends if i < vocabulary.num_text), dtype=torch.int64
    )
    answers: list[list[int]] = [[] for _ in rows]
    running = set(range(len(rows)))
    for _ in range(max_new_tokens):
        logits_BV = (
            head(decoder.last_RH).float().index_fill_(1, banned.to(decoder.device), -torch.inf)
        )
        ids_B = logits_BV.argmax(-1)
        for b, token in enumerate(ids_B.tolist()):
            if b not in running:
                continue
            if token in ends:
                running.discard(b)
                continue
            answers[b].append(token)
            if LINE_END in hf_tokenizer.decode([token]):
                running.discard(b)
        if not running:
            break
        decoder.step(ids_B)
    return [hf_tokenizer.decode(ids).split(LINE_END)[0].strip() for ids in answers]


def choose(logits_BK: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """One code a row: int64 (B,).

    Temperature, then top-k, then top-p, then the inverse of the distribution at `uniform_B`.
    """
    if sampling.temperature == 0:
        return logits_BK.argmax(-1)
    logits_BK = logits_BK / sampling.temperature
    if 0 < sampling.top_k < logits_BK.shape[1]:
        least_B1 = logits_BK.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < least_B1, -torch.inf)
    probabilities_BK = logits_BK.double().softmax(-1)
    if sampling.top_p < 1:
        probabilities_BK = _nucleus(probabilities_BK, sampling.top_p)
    sums_BK = probabilities_BK.cumsum(-1)
    drawn_B = torch.searchsorted(
        sums_BK, (uniform_B.double() * sums_BK[:, -1])[:, None], right=True
    ).squeeze(1)
    last_B = probabilities_BK.shape[1] - 1 - (probabilities_BK > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn_B, last_B)


def _nucleus(probabilities_BK: Tensor, top_p: float) -> Tensor:
    """Zero outside the smallest set of codes whose probabilities reach `top_p` (at least the best
    one is kept).
    """
    sorted_BK, order_BK = probabilities_BK.sort(dim=-1, descending=True, stable=True)
    before_BK = sorted_BK.cumsum(-1) - sorted_BK
    kept_BK = sorted_BK * (before_BK < max(top_p, torch.finfo(torch.float64).tiny))
    return torch.zeros_like(probabilities_BK).scatter_(1, order_BK, kept_BK)


def sample_uniform(seeds: Sequence[int], tokens: int) -> Tensor:
    """Random numbers in [0, 1) for each sample and token: float64 (B, tokens); a row depends on its
    own seed alone.
    """
    rows = [
        torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a run: a hash, so that neighbouring runs share no sample."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "big") >> 1


def end_ids(lm: nn.Module, vocabulary: VisualVocabulary) -> set[int]:
    """Ids that end a text: the tokenizer's end token and those of the model's generation config
    (chat turn ends).
    """
    generation = getattr(lm.lm if isinstance(lm, UnifiedModel) else lm, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    more = [] if found is None else [found] if isinstance(found, int) else list(found)
    return {vocabulary.eos, *more}


def seeds_of(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of so many samples: of one number, or as given.

    ValueError: given for another number of them.
    """
    if isinstance(seed, int):
        return [sample_seed(seed, index) for index in range(count)]
    if len(seed) != count:
        raise ValueError(
            f"{len(seed)} seeds for {count} prompts; give one number, or one a prompt."
        )
    return list(seed)


class _Compiled(NamedTuple):
    """What stays with a language model whose steps are compiled: its caches by shape, the newest
    last.
    """

    backend: str
    step: Any
    caches: dict[Any, Cache]


class Decoder:
    """One batch of left-padded rows run through a language model with a key–value cache of `room`
    further positions. codes: those of the rows' visual places, where a place holds several (N,
    2, R).

    Mask and cache are laid out once. compile: the backend of `torch.compile` for single steps
    ("inductor" makes CUDA graphs on a GPU); shapes then never change, and the compiled model is
    kept with the language model.
    """

    last_RH: Tensor

    def __init__(
        self,
        lm: Any,
        rows: Sequence[Sequence[int]],
        pad: int,
        room: int,
        compile: str | None = None,
        codes: Tensor | None = None,
    ) -> None:
        unified = isinstance(lm, UnifiedModel)
        self.causal_lm = lm.lm if unified else lm
        self.embed = lm.inputs_embeds if unified else lm.get_input_embeddings()
        self.device = next(lm.parameters()).device
        if any(not row for row in rows):
            raise VocabularyError(
                "An empty prompt cannot be continued: it must hold at least one token."
            )
        longest = max(len(row) for row in rows)
        ids_RL = torch.tensor(
            [[pad] * (longest - len(row)) + list(row) for row in rows], device=self.device
        )
        self.pads_R = torch.tensor([longest - len(row) for row in rows], device=self.device)
        self.length, self.compile = longest, compile
        total = longest + room if compile is None else math.ceil((longest + room) / STEP) * STEP
        places_T = torch.arange(total, device=self.device)
        self.seen_R1T = (places_T >= self.pads_R[:, None])[
            :, None
        ]  # what all later positions of a row see
        causal_LT = places_T[:longest, None] >= places_T
        self.thin = few_row_linears(self.causal_lm.base_model, len(rows)) if compile is None else []
        self.cache = (
            make_cache(self.causal_lm.config, total, static=False)
            if compile is None
            else self._kept(len(rows), total)
        )
        seen_RLT = self.seen_R1T & causal_LT | torch.eye(
            longest, total, dtype=torch.bool, device=self.device
        )
        positions_RL = (places_T[:longest] - self.pads_R[:, None]).clamp_min(0)
        embeds_RLH = (
            self.embed(ids_RL) if codes is None else self.embed(ids_RL, codes.to(self.device))
        )
        self._run(embeds_RLH, seen_RLT, positions_RL, self.causal_lm.base_model)

    def head_rows(self, start: int, count: int) -> nn.Module:
        """The output head cut to `count` rows from `start`: (…, H) → (…, count)."""
        head = self.causal_lm.get_output_embeddings()
        part = nn.Linear(head.in_features, count, bias=head.bias is not None, device="meta")
        part.weight = nn.Parameter(head.weight[start : start + count], requires_grad=False)
        if head.bias is not None:
            part.bias = nn.Parameter(head.bias[start : start + count], requires_grad=False)
        return part

    def step(self, ids_R: Tensor) -> None:
        """Append one token to every row."""
        self.append(self.embed(ids_R.to(self.device)[:, None]))

    def append(self, embeds_R1H: Tensor) -> None:
        """Append one position to every row."""
        seen_R1T = self.seen_R1T
        if self.compile:
            seen_R1T = seen_R1T & (
                torch.arange(seen_R1T.shape[-1], device=self.device) <= self.length
            )
        positions_R1 = (self.length - self.pads_R)[:, None]
        self.length += 1
        with as_columns(self.thin):
            model = self.causal_lm.base_model if self.compile is None else self._compiled().step
            self._run(embeds_R1H, seen_R1T, positions_R1, model)

    def _compiled(self) -> _Compiled:
        made: _Compiled | None = getattr(self.causal_lm, "_compiled_step", None)
        if made is None or made.backend != self.compile:
            assert self.compile is not None
            mode = "reduce-overhead" if self.compile == "inductor" else None
            forward = self.causal_lm.base_model.forward
            made = _Compiled(
                self.compile,
                torch.compile(forward, backend=self.compile, mode=mode, dynamic=False),
                {},
            )
            object.__setattr__(self.causal_lm, "_compiled_step", made)
        return made

    def _kept(self, rows: int, total: int) -> Cache:
        """An empty cache at the place of the last one of its shape: recorded CUDA graphs read and
        write there.
        """
        caches = self._compiled().caches
        key = (
            rows,
            total,
            self.device,
            next(self.causal_lm.parameters()).dtype,
            torch.is_inference_mode_enabled(),
        )
        cache = caches.pop(key, None) or make_cache(self.causal_lm.config, total, static=True)
        cache.reset()
        caches[key] = cache
        if len(caches) > SHAPES:
            del caches[next(iter(caches))]
        return cache

    def _run(self, embeds_RLH: Tensor, seen_RLT: Tensor, positions_RL: Tensor, model: Any) -> None:
        out = model(
            inputs_embeds=embeds_RLH,
            attention_mask=self._mask(seen_RLT if self.compile else seen_RLT[..., : self.length]),
            position_ids=positions_RL,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.last_RH = out.last_hidden_state[
            :, -1
        ].clone()  # a CUDA graph writes its next output to the same place

    def _mask(self, seen_RLT: Tensor) -> Tensor:
        """The mask as it stands, where attention takes one; else the padding, of which transformers
        makes what it needs.
        """
        config = self.causal_lm.config.get_text_config()
        sliding = set(getattr(config, "layer_types", None) or ["full_attention"]) != {
            "full_attention"
        }
        if sliding or config._attn_implementation != "sdpa":
            return self.seen_R1T[:, 0, : self.length].long()
        return seen_RLT[:, None]
