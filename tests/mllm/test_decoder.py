"""Decoding with a cache against transformers' own, and compiled steps."""

from __future__ import annotations

import pytest
import torch

from smalti.mllm.decoder import Decoder
from smalti.mllm.generation import draw
from smalti.schema import Sampling

PROMPTS = ["a blue circle", "", "a red square, is it red? no"]
T = 6


def two_pass_logits(tiny, prompt: list[int], drawn: list[int], cfg: float) -> list[torch.Tensor]:
    """Guided logits of the whole vocabulary at every token, as transformers gives them: each half
    with a cache of its own.
    """
    v, model, found = tiny.vocabulary, tiny.model, []
    halves = [{"ids": prompt, "cache": None}, {"ids": [v.bos, v.boi], "cache": None}]
    for code in [*drawn, None]:
        logits = []
        for half in halves:
            embeds = model.inputs_embeds(torch.tensor([half["ids"]]))
            out = model.lm(inputs_embeds=embeds, past_key_values=half["cache"], use_cache=True)
            half["cache"], half["ids"] = out.past_key_values, [v.first_visual + (code or 0)]
            logits.append(out.logits[0, -1])
        found.append(logits[1] + cfg * (logits[0] - logits[1]))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_equal_two_passes_with_a_cache_in_transformers(tiny, attention: str) -> None:
    tiny.model.lm.set_attn_implementation(attention)
    v, drawn = tiny.vocabulary, [3, 0, 23, 7, 7]
    prompts = [tiny.text.caption_prompt(prompt) for prompt in PROMPTS]
    decoder = Decoder(tiny.model, [*prompts, *[[v.bos, v.boi]] * 3], v.pad, len(drawn))
    head = decoder.head_rows(v.first_visual, v.num_codes)
    expected = [two_pass_logits(tiny, prompt, drawn, 3.0) for prompt in prompts]
    for t in range(len(drawn) + 1):
        conditional, unconditional = head(decoder.last_RH).chunk(2)
        guided = unconditional + 3.0 * (conditional - unconditional)
        for b in range(3):
            torch.testing.assert_close(
                guided[b], expected[b][t][v.first_visual : v.size], rtol=1e-5, atol=2e-5
            )
        if t < len(drawn):
            decoder.step(torch.full((6,), v.first_visual + drawn[t]))


def test_compiled_steps_draw_the_same_and_find_their_cache_where_it_was(tiny) -> None:
    """One cache for a shape, which CUDA graphs are recorded for: empty again, whatever was drawn
    before.
    """
    places = set()
    for texts in (PROMPTS, ["a blue circle", "red", "no"], PROMPTS[::-1]):
        prompts = [tiny.text.caption_prompt(text) for text in texts]
        plain, compiled = (
            draw(
                tiny.model,
                tiny.vocabulary,
                prompts,
                tokens=T,
                sampling=Sampling(cfg=2.0),
                seed=3,
                compile=how,
            )
            for how in (None, "eager")
        )
        assert torch.equal(plain, compiled)
        caches = tiny.model.lm._compiled_step.caches
        places |= {cache.layers[0].keys.data_ptr() for cache in caches.values()}
    assert len(places) == 1
    for count in (1, 2, 4, 5, 1):
        Decoder(tiny.model, prompts[:1] * count, tiny.vocabulary.pad, T, "eager")
    assert [key[0] for key in caches] == [2, 4, 5, 1], "the last four shapes"
