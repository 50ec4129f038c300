"""Decode a batch of prompts step by step with a key–value cache.

Axes: R rows of the batch, L prompt positions, T positions of the cache, N visual places, H width of
the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from smalti.errors import VocabularyError
from smalti.mllm.cache import as_columns, few_row_linears, make_cache
from smalti.mllm.language_model import output_head
from smalti.mllm.model import UnifiedModel

CausalLM = PreTrainedModel | UnifiedModel
"""A unified model, or its plain export."""
STEP = 64
"""The length of a static cache is a multiple of it: prompts of similar length share one."""
SHAPES = 4
"""Number of static caches that are kept."""


class _Compiled(NamedTuple):
    """The compiled step of a language model, and its caches by shape, the newest last."""

    backend: str
    step: Callable[..., BaseModelOutputWithPast]
    caches: dict[Hashable, Cache]


class Decoder:
    """Decodes one batch of left-padded prompts; the first pass runs in the constructor.

    Mask and cache are allocated once.

    Args:
        lm: a unified model or its export.
        rows: token ids of each prompt.
        pad: padding token.
        room: number of positions that can be appended.
        compile: backend of `torch.compile` for single steps; None runs them uncompiled. "inductor"
            records CUDA graphs on a GPU. Shapes then never change, and the compiled model is kept
            with the language model.
        codes: the codes (N, 2, R) of the prompts' visual places, if a place holds several.

    Raises:
        VocabularyError: if a prompt is empty.
    """

    last_RH: Tensor

    def __init__(
        self,
        lm: CausalLM,
        rows: Sequence[Sequence[int]],
        pad: int,
        room: int,
        compile: str | None = None,
        codes: Tensor | None = None,
    ) -> None:
        if any(not row for row in rows):
            raise VocabularyError(
                "An empty prompt cannot be continued: it must hold at least one token."
            )
        self.causal_lm: PreTrainedModel = lm.lm if isinstance(lm, UnifiedModel) else lm
        self.embed: Callable[..., Tensor] = (
            lm.inputs_embeds if isinstance(lm, UnifiedModel) else lm.get_input_embeddings()
        )
        self.device = next(lm.parameters()).device
        self.compile = compile
        self.length = max(len(row) for row in rows)
        padding = [self.length - len(row) for row in rows]
        self.pads_R = torch.tensor(padding, device=self.device)
        total = self.length + room
        if compile is not None:
            total = math.ceil(total / STEP) * STEP
        self.few_rows = [] if compile else few_row_linears(self.causal_lm.base_model, len(rows))
        self.cache = self._empty_cache(len(rows), total)
        places_T = torch.arange(total, device=self.device)
        # what all later positions of a row see
        self.seen_R1T = (places_T >= self.pads_R[:, None])[:, None]
        ids = [[pad] * count + list(row) for count, row in zip(padding, rows, strict=True)]
        self._first_pass(torch.tensor(ids, device=self.device), places_T, codes)

    def _first_pass(self, ids_RL: Tensor, places_T: Tensor, codes: Tensor | None) -> None:
        places_L = places_T[: self.length]
        causal_LT = places_L[:, None] >= places_T
        # padding sees itself: a row without any key would be NaN
        own_LT = torch.eye(self.length, len(places_T), dtype=torch.bool, device=self.device)
        seen_RLT = self.seen_R1T & causal_LT | own_LT
        positions_RL = (places_L - self.pads_R[:, None]).clamp_min(0)
        more = () if codes is None else (codes.to(self.device),)
        embeds_RLH = self.embed(ids_RL, *more)
        self._run(embeds_RLH, seen_RLT, positions_RL, self.causal_lm.base_model)

    def head_rows(self, start: int, count: int) -> nn.Module:
        """The output head cut to `count` rows from `start`: (…, H) → (…, count)."""
        head = output_head(self.causal_lm)
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
            places_T = torch.arange(seen_R1T.shape[-1], device=self.device)
            seen_R1T = seen_R1T & (places_T <= self.length)
        positions_R1 = (self.length - self.pads_R)[:, None]
        self.length += 1
        with as_columns(self.few_rows):
            model = self.causal_lm.base_model if self.compile is None else self._compiled().step
            self._run(embeds_R1H, seen_R1T, positions_R1, model)

    def _compiled(self) -> _Compiled:
        compiled: _Compiled | None = getattr(self.causal_lm, "_compiled_step", None)
        if compiled is None or compiled.backend != self.compile:
            assert self.compile is not None
            mode = "reduce-overhead" if self.compile == "inductor" else None
            forward = self.causal_lm.base_model.forward
            step = torch.compile(forward, backend=self.compile, mode=mode, dynamic=False)
            compiled = _Compiled(self.compile, step, {})
            object.__setattr__(self.causal_lm, "_compiled_step", compiled)
        return compiled

    def _empty_cache(self, rows: int, total: int) -> Cache:
        """An empty cache; a static one is reused at its address.

        Recorded CUDA graphs read and write there.
        """
        if self.compile is None:
            return make_cache(self.causal_lm.config, total, static=False)
        caches = self._compiled().caches
        dtype = next(self.causal_lm.parameters()).dtype
        key = (rows, total, self.device, dtype, torch.is_inference_mode_enabled())
        cache = caches.pop(key, None) or make_cache(self.causal_lm.config, total, static=True)
        cache.reset()
        caches[key] = cache
        if len(caches) > SHAPES:
            del caches[next(iter(caches))]
        return cache

    def _run(
        self,
        embeds_RLH: Tensor,
        seen_RLT: Tensor,
        positions_RL: Tensor,
        model: Callable[..., BaseModelOutputWithPast],
    ) -> None:
        out = model(
            inputs_embeds=embeds_RLH,
            attention_mask=self._mask(seen_RLT if self.compile else seen_RLT[..., : self.length]),
            position_ids=positions_RL,
            past_key_values=self.cache,
            use_cache=True,
        )
        assert out.last_hidden_state is not None
        # a copy: a CUDA graph writes its next output to the same address
        self.last_RH = out.last_hidden_state[:, -1].clone()

    def _mask(self, seen_RLT: Tensor) -> Tensor:
        """The whole mask if the attention takes one, else the padding mask.

        From the padding mask, transformers builds what the attention needs.
        """
        config = self.causal_lm.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or config._attn_implementation != "sdpa":
            return self.seen_R1T[:, 0, : self.length].long()
        return seen_RLT[:, None]
