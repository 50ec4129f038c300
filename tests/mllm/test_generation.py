"""Drawing and answering against plain recomputation without a cache, without padding, without
batches.
"""

from __future__ import annotations

import pytest
import torch

from smalti.errors import VocabularyError
from smalti.mllm.generation import answer, draw
from smalti.mllm.prompts import LINE_END
from smalti.mllm.sampling import choose, sample_seed, sample_uniform
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
    """Reference: two separate passes per token, everything recomputed."""
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


def answer_slowly(tiny, codes: list[int], question: str, limit: int) -> str:
    v, model = tiny.vocabulary, tiny.model
    ids = [
        v.bos,
        v.und_start,
        *(v.first_visual + c for c in codes),
        v.und_end,
        *tiny.text.question_prompt(question),
    ]
    found: list[int] = []
    for _ in range(limit):
        with torch.no_grad():
            logits = model.lm(
                inputs_embeds=model.inputs_embeds(torch.tensor([ids + found]))
            ).logits[0, -1, : v.num_text]
        logits[[v.pad, v.bos]] = -torch.inf
        found.append(int(logits.argmax()))
        if found[-1] == v.eos:
            found.pop()
            break
        if LINE_END in tiny.hf_tokenizer.decode([found[-1]]):
            break
    return tiny.hf_tokenizer.decode(found).split(LINE_END)[0].strip()


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
