"""Goal 12: sequence packing against padding to the batch's longest, on two distributions of
lengths.

`quickstart`: the mixture of recipes/semhitok-quickstart.yaml on real easy-vqa captions and
questions (64 codes an image, up to eight questions, micro batches of 12, rows of 384).
`long-tailed`: what a corpus mixed from images and text looks like (recipes/semhitok-256.yaml): 85 %
of the samples are 256 codes with a log-normal caption (median 40 tokens), 15 % are text, log-normal
with the mean of C4's documents (427 tokens) and a deviation of 1.0 of the logarithm; cut at 2,048;
micro batches of 64.

Efficiency is the share of a batch's places that hold a token. Useful tokens: tokens in as many
places as the padded batch has; `seconds` is that ratio for 12 sequences by the CPU time of the
forward and backward pass of a small model, both sides in turns (at width 128 attention over rows of
2,048 outweighs all else, which it does not at 3,584). The ratio is at most what padding wastes, so
3x is asked of the long-tailed mixture; that of the quickstart is shown beside it. Quality: 1 when
every token is in the packed batch once and the losses of both agree to 1e-5.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.language import MIXTURES
from bench.machine import machine
from smalti.mllm.losses import IGNORE
from smalti.mllm.sequences import TokenSequence, collate

GOAL_EFFICIENCY, GOAL_RATIO, TURNS, TIMED, WINDOW = 0.97, 3.0, 2, 12, 8


def padded(sequences: list[TokenSequence], pad: int) -> dict[str, torch.Tensor]:
    """One row a sequence, as wide as the longest."""
    parts = [collate([sequence], pad) for sequence in sequences]
    longest = max(part["input_ids"].shape[1] for part in parts)
    fills = {
        "input_ids": pad,
        "labels": IGNORE,
        "attention_mask": 0,
        "answer_mask": 0,
        "position_ids": 0,
    }
    fills |= {"segment_ids": 0, "document_ids": -1}
    batch = {}
    for name, fill in fills.items():
        rows = []
        for part in parts:
            plain = {"position_ids": torch.arange(part["input_ids"].shape[1])[None]}
            plain |= {
                "segment_ids": torch.zeros_like(part["input_ids"]),
                "document_ids": torch.zeros_like(part["input_ids"]),
            }
            row = part.get(name, plain.get(name))
            rows.append(torch.nn.functional.pad(row[0], (0, longest - row.shape[1]), value=fill))
        batch[name] = torch.stack(rows)
    if not batch["segment_ids"].any():
        for name in ("position_ids", "document_ids", "segment_ids"):
            del batch[name]
    return batch


def in_buckets(batches: list[list[TokenSequence]]) -> float:
    """Efficiency of padding where the sequences of WINDOW batches are sorted by length before they
    are cut into batches.
    """
    size, tokens, places = len(batches[0]), 0, 0
    for first in range(0, len(batches), WINDOW):
        lengths = sorted(
            len(sequence.ids) for batch in batches[first : first + WINDOW] for sequence in batch
        )
        tokens += sum(lengths)
        places += sum(size * max(lengths[at : at + size]) for at in range(0, len(lengths), size))
    return tokens / places


def main() -> None:
    torch.manual_seed(0)
    ratios, efficiencies, seconds, same = {}, {}, {}, True
    for name, (make, room) in MIXTURES.items():
        model, batches = make()
        pad, places = model.vocabulary.pad, []
        for sequences in batches:
            tokens = sum(len(sequence.ids) for sequence in sequences)
            longest = max(len(sequence.ids) for sequence in sequences)
            packed = collate(sequences, pad, room)
            same &= int(packed["attention_mask"].sum()) == tokens
            places.append((tokens, len(sequences) * longest, packed["input_ids"].numel()))
        tokens, without, within = np.array(places).sum(0)
        efficiencies[name] = round(float(tokens / within), 3)
        print(f"{name}: padded in length buckets over {WINDOW} batches {in_buckets(batches):.3f}")
        ratios[name] = round(float(without / within), 2)
        seconds[name], agree = timed(model, [batches[0][:TIMED]], pad, room)
        same &= agree
        print(
            f"{name}: efficiency {tokens / within:.3f} (padded {tokens / without:.3f}), useful tokens {ratios[name]:.2f}x"
        )
    met = (
        same
        and min(efficiencies.values()) >= GOAL_EFFICIENCY
        and ratios["long-tailed"] >= GOAL_RATIO
    )
    result = {
        "goal": 12,
        "ratio": ratios["long-tailed"],
        "ratios": ratios,
        "efficiency": efficiencies,
        "seconds": seconds,
        "quality": float(same),
        "met": bool(met),
        "machine": machine(),
    }
    print(json.dumps(result))


def timed(model, batches: list[list[TokenSequence]], pad: int, room: int) -> tuple[float, bool]:
    """CPU-seconds of forward and backward, padded over packed (median of turns); whether the losses
    agree.
    """
    sides = [
        [padded(sequences, pad) for sequences in batches],
        [collate(sequences, pad, room) for sequences in batches],
    ]
    times, losses = [], []
    for _ in range(TURNS):
        turn = []
        for side in sides:
            started = time.process_time()
            total = [model(batch)[0] for batch in side]
            for loss in total:
                loss.backward()
            turn.append(time.process_time() - started)
            losses.append([float(loss.detach()) for loss in total])
            model.zero_grad(set_to_none=True)
        times.append(turn[0] / turn[1])
    agree = bool(np.allclose(losses[0], losses[1], rtol=1e-5, atol=1e-5))
    return round(statistics.median(times), 2), agree


if __name__ == "__main__":
    main()
