"""Goal 11: text to image with guidance, against two passes with a key-value cache in transformers.

A Qwen2 of width 512 and 8 layers, a vocabulary of 4,096 text tokens and 8,192 codes, 256 codes an
image, one image and four at a time. The other side runs the conditional and the unconditional
sequence by themselves, each with the cache that transformers makes, and its head over the whole
vocabulary. One thread, in turns; the medians of CPU-seconds count. Quality: 1 when both draw the
same codes (greedy).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from bench.language import small_model
from bench.machine import machine
from bench.turns import in_turns
from smalti.mllm.generation import draw
from smalti.schema import LanguageModel, Sampling

SIZE = LanguageModel(
    hidden_size=512, layers=8, heads=8, kv_heads=2, intermediate_size=1536, text_vocab_size=4096
)
CODES, TOKENS, CFG, TURNS, GOAL, BATCHES = 8192, 256, 3.0, 2, 1.5, (1, 4)


@torch.no_grad()
def two_passes(lm, embed, vocabulary, prompts: list[list[int]]) -> Tensor:
    """Codes (B, T), greedy; prompts of one length."""
    rows = [prompts, [[vocabulary.bos, vocabulary.boi]] * len(prompts)]
    halves: list[list] = [[torch.tensor(half), None] for half in rows]
    codes = []
    for _ in range(TOKENS):
        logits = []
        for half in halves:
            out = lm(
                inputs_embeds=embed(half[0]),
                past_key_values=half[1],
                use_cache=True,
                logits_to_keep=1,
            )
            half[1] = out.past_key_values
            logits.append(out.logits[:, -1].float())
        guided_BV = logits[1] + CFG * (logits[0] - logits[1])
        codes.append(guided_BV[:, vocabulary.first_visual : vocabulary.size].argmax(-1))
        for half in halves:
            half[0] = codes[-1][:, None] + vocabulary.first_visual
    return torch.stack(codes, 1)


def made_up_words() -> list[str]:
    """Enough different words for a vocabulary of 4,096 tokens."""
    letters, rng = "abcdefghijklmnopqrstuvwxyz", np.random.default_rng(0)
    words = [
        "".join(letters[i] for i in rng.integers(26, size=rng.integers(3, 8))) for _ in range(4000)
    ]
    return [" ".join(words)] * 2


def main() -> None:
    torch.set_num_threads(1)
    model, _ = small_model(SIZE, CODES, made_up_words(), 512)
    model.eval()
    vocabulary = model.vocabulary
    generator = torch.Generator().manual_seed(0)
    ratios, same = {}, True
    for num in BATCHES:
        words = torch.randint(
            300, vocabulary.num_text - 10, (num, 12), generator=generator
        ).tolist()
        prompts = [[vocabulary.bos, *row, vocabulary.boi] for row in words]

        drawn: dict[str, Tensor] = {}

        def ours(prompts: list[list[int]] = prompts, drawn: dict[str, Tensor] = drawn) -> None:
            greedy = Sampling(cfg=CFG, temperature=0.0)
            drawn["ours"] = draw(model, vocabulary, prompts, tokens=TOKENS, sampling=greedy)

        def theirs(prompts: list[list[int]] = prompts, drawn: dict[str, Tensor] = drawn) -> None:
            drawn["theirs"] = two_passes(model.lm, model.inputs_embeds, vocabulary, prompts)

        ours_s, theirs_s = in_turns(ours, theirs, TURNS, warm=True)
        same &= torch.equal(drawn["ours"], drawn["theirs"])
        ratios[num] = round(theirs_s / ours_s, 2)
        print(
            f"{num} image(s): one batch {ours_s:.2f} s, two passes {theirs_s:.2f} s: {ratios[num]:.2f}x"
        )
    result = {
        "goal": 11,
        "ratio": min(ratios.values()),
        "ratios": ratios,
        "quality": float(same),
        "met": bool(same and min(ratios.values()) >= GOAL),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
