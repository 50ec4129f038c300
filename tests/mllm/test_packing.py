"""Packed rows: nothing lost, nothing overfull, few and narrow; and the loss of a packed batch is
the unpacked one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.errors import ConfigError
from smalti.mllm.packing import WIDEST, best_fit, narrowest, pack
from smalti.mllm.sequences import SequenceBuilder, collate
from smalti.schema import MllmSection

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def filled(rows: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[index] for index in row) for row in rows]


@given(lengths=LENGTHS)
def test_best_fit_keeps_every_sequence_and_no_row_is_overfull(lengths: list[int]) -> None:
    rows = best_fit(lengths, max(lengths))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    full = filled(rows, lengths)
    assert max(full) <= max(lengths)
    assert all(a + b > max(lengths) for n, a in enumerate(full) for b in full[n + 1 :])


def slow_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Best fit as it is defined: every row looked at."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        left = [room - sum(lengths[i] for i in row) for row in rows]
        fitting = [row for row in range(len(rows)) if left[row] >= lengths[index]]
        if fitting:
            rows[min(fitting, key=lambda r: (left[r], r))].append(index)
        else:
            rows.append([index])
    return rows


@given(lengths=LENGTHS, room=st.integers(40, 120))
def test_best_fit_takes_the_fullest_row_that_fits(lengths: list[int], room: int) -> None:
    assert best_fit(lengths, room) == slow_best_fit(lengths, room)


@given(lengths=LENGTHS, room=st.integers(40, 120))
def test_packed_rows_hold_all_in_few_places(lengths: list[int], room: int) -> None:
    rows = pack(lengths, room)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    area, total = len(rows) * max(filled(rows, lengths)), sum(lengths)
    widest = max(int(WIDEST * room), *lengths)
    assert max(filled(rows, lengths)) <= widest
    for num in range(max(1, -(-total // int(1.5 * room))), round(total / room) + 2):
        found, width = narrowest(lengths, num)
        assert len(found) <= num and width == max(filled(found, lengths))
        assert width <= max(lengths) + -(-total // num)
        assert width > widest or (area, max(filled(rows, lengths))) <= (len(found) * width, width)


def test_half_empty_rows_are_made_narrow() -> None:
    """Two tenths of a row more than two rows hold: three of seven sequences, not two full ones and
    one of a single one.
    """
    lengths = [9] * 21
    assert sorted(filled(best_fit(lengths, 90), lengths)) == [9, 90, 90]
    assert filled(pack(lengths, 90), lengths) == [63, 63, 63]
    assert filled(pack([7] * 6, 20), [7] * 6) == [14, 14, 14], "of the same area the narrowest"
    assert filled(pack([1000] * 16, 1000), [1000] * 16) == [1000] * 16
    assert filled(pack([900] * 16, 1000), [900] * 16) == [900] * 16, (
        "two of them are wider than one and a half rows"
    )
    assert pack([], 5) == [] and pack([7], 5) == [[0]]


@pytest.mark.parametrize("num", [8, 32, 128])
def test_long_tails_pack_above_97_hundredths(num: int) -> None:
    """Of all places of 20 batches, at any size of a micro batch."""
    tokens = places = 0
    for seed in range(20):
        lengths = (
            np.random.default_rng(seed).lognormal(5.3, 0.8, num).astype(int).clip(16, 2048).tolist()
        )
        rows = pack(lengths, 2048)
        tokens, places = tokens + sum(lengths), places + len(rows) * max(filled(rows, lengths))
    assert tokens / places >= 0.97


CODES = np.array([3, 0, 23, 7], dtype=np.int32)
QUESTIONS = [("is it red?", "no"), ("what shape is it?", "circle"), ("is it blue?", "yes")]
ROW = {
    "codes": CODES,
    "caption": "a blue circle",
    "qa": [{"question": question, "answer": answer} for question, answer in QUESTIONS],
}


@pytest.mark.parametrize("isolate", [True, False])
def test_the_loss_of_a_packed_batch_is_that_of_its_sequences_alone(tiny, isolate: bool) -> None:
    """Values and gradients, with questions that do not see each other and with chained ones."""
    builder = SequenceBuilder(
        tiny.hf_tokenizer, tiny.vocabulary, questions_per_image=3, isolate_questions=isolate
    )
    kinds = [
        "qa",
        "caption_to_image",
        "qa",
        "image_to_caption",
        "qa",
        "caption_to_image",
        "image_to_caption",
    ]
    sequences = [builder.build(kind, ROW, np.random.default_rng(n)) for n, kind in enumerate(kinds)]
    sequences.append(builder.build("text", {"text": "a red square " * 4}, np.random.default_rng(0)))
    model, pad = tiny.model, tiny.vocabulary.pad
    packed = collate(sequences, pad, room=60)
    assert 1 < len(packed["input_ids"]) < len(sequences)
    alone = [collate([sequence], pad) for sequence in sequences]
    weight = sum(model.loss_weight(batch) for batch in alone)
    torch.testing.assert_close(model.loss_weight(packed), weight)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, metrics = model(packed)
    expected = sum(model({**batch, "loss_weight": weight})[0] for batch in alone)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for grad, right in zip(
        *(torch.autograd.grad(t, parameters) for t in (found, expected)), strict=True
    ):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)
    assert metrics["tokens_answer"] == sum(int(sequence.answers.sum()) for sequence in sequences)


def test_one_row_without_padding_gives_the_loss_of_packed_rows(tiny) -> None:
    """The form that flash-attention gets; here transformers finds the documents by their positions
    and SDPA computes it.
    """
    builder = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary)
    kinds = ["qa", "caption_to_image", "image_to_caption", "caption_to_image", "qa"]
    sequences = [builder.build(kind, ROW, np.random.default_rng(n)) for n, kind in enumerate(kinds)]
    sequences.append(builder.build("text", {"text": "a red square " * 6}, np.random.default_rng(0)))
    sequences = [replace(sequence, segments=0 * sequence.segments) for sequence in sequences]
    packed = collate(sequences, tiny.vocabulary.pad)
    assert (packed["document_ids"] < 0).any() and len(packed["input_ids"]) < len(sequences)
    expected, _ = tiny.model(packed)
    tiny.model.one_row = True
    torch.testing.assert_close(tiny.model(packed)[0], expected, rtol=1e-5, atol=1e-5)


def test_flash_attention_that_is_not_there_names_the_setting(make_unified) -> None:
    with pytest.raises(ConfigError, match=r"mllm\.attention=flash is not available here"):
        make_unified(attention="flash")
    with pytest.raises(ValueError, match="cannot keep the questions of one image apart"):
        MllmSection(attention="flash", questions_per_image=2)
