"""Drawing and answering against plain recomputation without a cache, without padding, without
batches.
"""

from __future__ import annotations

import pytest
import torch

from smalti.errors import VocabularyError
from smalti.mllm.generation import Decoder, answer, choose, draw, sample_seed, sample_uniform
from smalti.mllm.prompts import LINE_END
from smalti.schema import Sampling

PROMPTS = ["a blue circle", "", "a red square, is it red? no"]
T = 6


def visual_logits(tiny, ids: list[int]) -> torch.Tensor:
    """Logits of the visual codes after one unpadded row, from the whole model: (K,)."""
    v, model = tiny.vocabulary, tiny.model
    with torch.no_grad():
        logits = model.lm(inputs_embeds=model.inputs_embeds(torch.tensor([ids]))).logits[0, -1]
    return logits[v.first_visual : v.size]


def draw_slowly(tiny, prompt: list[int], sampling: Sampling, uniform: torch.Tensor) -> list[int]:
    """Reference: two separate passes a token, everything computed anew."""
    v, codes = tiny.vocabulary, []
    for t in range(T):
        drawn = [v.first_visual + code for code in codes]
        conditional, unconditional = (
            visual_logits(tiny, prompt + drawn),
            visual_logits(tiny, [v.bos, v.boi, *drawn]),
        )
        guided = unconditional + sampling.cfg * (conditional - unconditional)
        codes.append(int(choose(guided[None], sampling, uniform[t : t + 1])))
    return codes


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(cfg=3.0, temperature=0.0),
        Sampling(cfg=1.0, temperature=0.0),
        Sampling(cfg=0.0, temperature=0.0),
        Sampling(cfg=2.5, temperature=0.8, top_k=7, top_p=0.9),
        Sampling(cfg=1.0, temperature=1.3),
    ],
)
def test_batched_cached_drawing_equals_two_separate_passes(tiny, sampling: Sampling) -> None:
    prompts = [tiny.text.caption_prompt(prompt) for prompt in PROMPTS]
    found = draw(
        tiny.model, tiny.vocabulary, prompts, tokens=T, sampling=sampling, seed=[11, 12, 13]
    )
    uniform = sample_uniform([11, 12, 13], T)
    assert found.shape == (3, T)
    for b, prompt in enumerate(prompts):
        assert found[b].tolist() == draw_slowly(tiny, prompt, sampling, uniform[b])


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


def test_guidance_matters_and_the_empty_prompt_is_its_own_condition(tiny) -> None:
    prompts = [tiny.text.caption_prompt(prompt) for prompt in PROMPTS]
    plain, strong = (
        draw(
            tiny.model,
            tiny.vocabulary,
            prompts,
            tokens=T,
            sampling=Sampling(cfg=cfg, temperature=0.0),
        )
        for cfg in (1, 9)
    )
    assert not torch.equal(plain, strong)
    assert torch.equal(plain[1], strong[1])


def test_a_sample_does_not_depend_on_its_batch(tiny) -> None:
    prompts = [tiny.text.caption_prompt(prompt) for prompt in PROMPTS * 2]
    seeds = [sample_seed(0, index) for index in range(6)]
    sampling = Sampling(cfg=2.0)
    whole = draw(tiny.model, tiny.vocabulary, prompts, tokens=T, sampling=sampling, seed=0)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        alone = draw(
            tiny.model,
            tiny.vocabulary,
            prompts[part],
            tokens=T,
            sampling=sampling,
            seed=seeds[part],
        )
        assert torch.equal(alone, whole[part])
    assert not torch.equal(whole[0], whole[3])


def test_no_prompts_and_empty_rows(tiny) -> None:
    assert draw(tiny.model, tiny.vocabulary, [], tokens=T, sampling=Sampling()).shape == (0, T)
    with pytest.raises(VocabularyError, match="empty prompt"):
        draw(tiny.model, tiny.vocabulary, [[]], tokens=T, sampling=Sampling())
    with pytest.raises(ValueError, match="2 seeds for 1"):
        draw(tiny.model, tiny.vocabulary, [[1]], tokens=T, sampling=Sampling(), seed=[1, 2])


def test_codes_are_drawn_in_proportion() -> None:
    probabilities = torch.tensor([0.5, 0.1, 0.0, 0.4])
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    logits = probabilities.log().expand(10_000, 4)
    drawn = choose(logits, Sampling(), uniform)
    torch.testing.assert_close(
        drawn.bincount(minlength=4) / 10_000, probabilities, atol=2e-3, rtol=0
    )


def test_top_k_and_top_p_keep_the_best_only() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1000, 4)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    assert set(choose(logits, Sampling(top_k=2), uniform).tolist()) == {0, 1}
    assert set(choose(logits, Sampling(top_p=0.65), uniform).tolist()) == {0, 1}
    assert set(choose(logits, Sampling(top_p=0.75), uniform).tolist()) == {0, 1, 2}
    assert set(choose(logits, Sampling(top_p=0.0), uniform).tolist()) == {0}
    assert set(choose(logits, Sampling(top_k=99), uniform).tolist()) == {0, 1, 2, 3}


def test_the_largest_random_number_never_leaves_the_support() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose(logits, Sampling(), almost_one).item() == 1


def test_seeds_of_samples_differ() -> None:
    seeds = {sample_seed(seed, index) for seed in range(20) for index in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def answer_slowly(tiny, codes: list[int], question: str, limit: int) -> str:
    v, model = tiny.vocabulary, tiny.model
    ids = [
        v.bos,
        v.und_start,
        *(v.first_visual + c for c in codes),
        v.und_end,
        *tiny.text.question_prompt(question),
    ]
    told: list[int] = []
    for _ in range(limit):
        with torch.no_grad():
            logits = model.lm(inputs_embeds=model.inputs_embeds(torch.tensor([ids + told]))).logits[
                0, -1, : v.num_text
            ]
        logits[[v.pad, v.bos]] = -torch.inf
        told.append(int(logits.argmax()))
        if told[-1] == v.eos:
            told.pop()
            break
        if LINE_END in tiny.hf_tokenizer.decode([told[-1]]):
            break
    return tiny.hf_tokenizer.decode(told).split(LINE_END)[0].strip()


def test_batched_answers_equal_single_ones(tiny) -> None:
    questions = ["is it red?", "what shape is it? what shape is it? or not?", "why?"]
    codes = torch.randint(0, 24, (3, 4), generator=torch.Generator().manual_seed(0))
    found = answer(
        tiny.model, tiny.hf_tokenizer, tiny.vocabulary, codes, questions, max_new_tokens=8
    )
    expected = [
        answer_slowly(tiny, row.tolist(), q, 8) for row, q in zip(codes, questions, strict=True)
    ]
    assert found == expected
    assert any(expected)


def test_a_trained_model_stops_at_the_line_end_and_at_the_end_token(tiny) -> None:
    v, model = tiny.vocabulary, tiny.model
    head = model.lm.get_output_embeddings().weight
    codes = torch.zeros((1, 4), dtype=torch.int64)
    for end in (tiny.text.line_end[-1], v.eos):
        with torch.no_grad():
            head[: v.num_text] = 0
            prompt = [
                v.bos,
                v.und_start,
                *[v.first_visual] * 4,
                v.und_end,
                *tiny.text.question_prompt("why?"),
            ]
            embeds = model.inputs_embeds(torch.tensor([prompt]))
            head[end] = model.lm.base_model(inputs_embeds=embeds).last_hidden_state[0, -1]
        assert answer(model, tiny.hf_tokenizer, v, codes, ["why?"], max_new_tokens=5) == [""]


def test_answers_want_one_question_an_image(tiny) -> None:
    with pytest.raises(ValueError, match="2 images but 1 questions"):
        answer(
            tiny.model,
            tiny.hf_tokenizer,
            tiny.vocabulary,
            torch.zeros((2, 4), dtype=torch.int64),
            ["why?"],
        )
    with pytest.raises(VocabularyError, match="up to 24"):
        answer(tiny.model, tiny.hf_tokenizer, tiny.vocabulary, torch.full((1, 4), 24), ["why?"])
    assert (
        answer(
            tiny.model,
            tiny.hf_tokenizer,
            tiny.vocabulary,
            torch.zeros((0, 4), dtype=torch.int64),
            [],
        )
        == []
    )
