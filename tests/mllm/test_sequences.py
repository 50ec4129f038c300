"""Sequences by construction: every id and label written down from the formats.

Covers: mllm/token_sequence.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smalti.errors import ConfigError, VocabularyError
from smalti.mllm.losses import IGNORE
from smalti.mllm.packing import visible_mask
from smalti.mllm.sequences import SequenceBuilder, caption_of, collate, questions_of
from smalti.schema import Mixture

CODES = np.array([3, 0, 23, 7], dtype=np.int32)
QA = [
    {"question": "is it red?", "answer": "no"},
    {"question": "what  shape\nis it?", "answer": "circle"},
    {"question": "is it blue?", "answer": "yes"},
]
ROW = {
    "image_id": "x",
    "codes": CODES,
    "caption": "a blue circle",
    "label": "blue circle",
    "qa": QA,
}


@pytest.fixture
def builder(tiny) -> SequenceBuilder:
    return SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, uncond_probability=0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def encode(tiny, text: str) -> list[int]:
    return tiny.hf_tokenizer(text, add_special_tokens=False).input_ids


def image(tiny) -> list[int]:
    return [tiny.vocabulary.first_visual + int(code) for code in CODES]


def test_caption_to_image(tiny, builder) -> None:
    v = tiny.vocabulary
    ids = [v.bos, *encode(tiny, "a blue circle"), v.boi, *image(tiny), v.eoi, v.eos]
    built = builder.build("caption_to_image", ROW, rng())
    assert built.ids.tolist() == ids
    assert built.labels.tolist() == [IGNORE, *ids[1:]]
    assert not built.answers.any()


def test_caption_to_image_not_dense_predicts_the_image_alone(tiny) -> None:
    v = tiny.vocabulary
    builder = SequenceBuilder(tiny.hf_tokenizer, v, uncond_probability=0.0, dense=False)
    labels = builder.build("caption_to_image", ROW, rng()).labels.tolist()
    num_given = 2 + len(encode(tiny, "a blue circle"))
    assert labels == [IGNORE] * num_given + [*image(tiny), v.eoi, v.eos]


def test_unconditional_image_is_the_empty_prompt(tiny) -> None:
    v = tiny.vocabulary
    always = SequenceBuilder(tiny.hf_tokenizer, v, uncond_probability=1.0)
    ids = [v.bos, v.boi, *image(tiny), v.eoi, v.eos]
    assert always.build("caption_to_image", ROW, rng()).ids.tolist() == ids
    never = SequenceBuilder(tiny.hf_tokenizer, v, uncond_probability=0.0)
    assert never.build("caption_to_image", {"codes": CODES}, rng()).ids.tolist() == ids
    assert tiny.text.caption_prompt("") == tiny.text.caption_prompt(None) == ids[:2]


def test_share_of_unconditional_images(tiny) -> None:
    builder = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, uncond_probability=0.1)
    generator, short = rng(), 4 + 4
    lengths = [len(builder.build("caption_to_image", ROW, generator).ids) for _ in range(2000)]
    assert 150 < sum(length == short for length in lengths) < 250


def test_image_to_caption_takes_the_label_where_there_is_no_caption(tiny, builder) -> None:
    v = tiny.vocabulary
    row = {"codes": CODES, "caption": None, "label": "blue circle"}
    ids = [v.bos, v.und_start, *image(tiny), v.und_end, *encode(tiny, "blue circle"), v.eos]
    built = builder.build("image_to_caption", row, rng())
    assert built.ids.tolist() == ids
    assert built.labels.tolist() == [IGNORE, *ids[1:]]


def test_chained_questions(tiny) -> None:
    v = tiny.vocabulary
    builder = SequenceBuilder(tiny.hf_tokenizer, v, questions_per_image=2, dense=False)
    order = rng(5).permutation(3)[:2]
    built = builder.build("qa", ROW, rng(5))
    line = encode(tiny, "\n")
    ids, labels, answers = [v.bos, v.und_start, *image(tiny), v.und_end], [], []
    labels += [IGNORE] * len(ids)
    answers += [False] * len(ids)
    for question, answer in (questions_of(ROW)[i] for i in order):
        asked, reply = [*encode(tiny, question), *line], encode(tiny, answer)
        ids += [*asked, *reply, *line]
        labels += [IGNORE] * len(asked) + [*reply, *line]
        answers += [False] * len(asked) + [True] * len(reply) + [False] * len(line)
    assert built.ids.tolist() == [*ids, v.eos]
    assert built.labels.tolist() == [*labels, v.eos]
    assert built.answers.tolist() == [*answers, False]


def test_questions_are_on_one_line_and_never_repeat(tiny) -> None:
    builder = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, questions_per_image=9)
    text = tiny.hf_tokenizer.decode(builder.build("qa", ROW, rng()).ids, skip_special_tokens=True)
    lines = text.split("<IMG_7>")[1].strip().split("\n")
    assert sorted(zip(lines[::2], lines[1::2], strict=True)) == sorted(questions_of(ROW))


def test_prompt_of_a_question_is_the_start_of_its_training_sequence(tiny, builder) -> None:
    v = tiny.vocabulary
    prompt = [v.bos, v.und_start, *image(tiny), v.und_end, *tiny.text.question_prompt("is it red?")]
    built = builder.build("qa", {**ROW, "qa": QA[:1]}, rng())
    assert built.ids[: len(prompt)].tolist() == prompt
    assert (
        tiny.text.caption_prompt("a blue circle")
        == builder.build("caption_to_image", ROW, rng()).ids[:-6].tolist()
    )


def test_text(tiny, builder) -> None:
    v = tiny.vocabulary
    built = builder.build("text", {"text": "a red square"}, rng())
    assert built.ids.tolist() == [v.bos, *encode(tiny, "a red square"), v.eos]


def test_kinds_follow_what_a_row_holds(builder) -> None:
    assert builder.kinds_for(ROW) == ("caption_to_image", "image_to_caption", "qa")
    assert builder.kinds_for({"codes": CODES, "caption": None, "label": None, "qa": None}) == (
        "caption_to_image",
    )
    assert builder.kinds_for({**ROW, "qa": [{"question": "why?", "answer": None}]}) == (
        "caption_to_image",
        "image_to_caption",
    )
    assert builder.kinds_for({"text": "hello"}) == ("text",)
    assert builder.kinds_for({"text": " "}) == ()
    assert caption_of({"caption": "  ", "label": "a  cat"}) == "a cat"


def test_kinds_are_drawn_by_weight(tiny) -> None:
    mixture = Mixture(caption_to_image=1.0, image_to_caption=0.0, qa=3.0)
    builder = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, mixture=mixture)
    generator = rng()
    kinds = [builder.sample_kind(ROW, generator) for _ in range(2000)]
    assert set(kinds) == {"caption_to_image", "qa"}
    assert 0.70 < kinds.count("qa") / 2000 < 0.80
    assert builder.sample_kind({"text": "hello"}, generator) is None
    with pytest.raises(ConfigError, match=r"mllm\.mixture"):
        SequenceBuilder(
            tiny.hf_tokenizer,
            tiny.vocabulary,
            mixture=Mixture(caption_to_image=0.0, image_to_caption=0.0, qa=0.0),
        )


def test_the_same_state_gives_the_same_sequence(builder) -> None:
    for kind in ("caption_to_image", "image_to_caption", "qa"):
        assert (
            builder.build(kind, ROW, rng(3)).ids.tolist()
            == builder.build(kind, ROW, rng(3)).ids.tolist()
        )


def test_long_text_is_cut_and_counted_but_no_image(tiny) -> None:
    v, long = tiny.vocabulary, "a red square " * 50
    builder = SequenceBuilder(tiny.hf_tokenizer, v, uncond_probability=0.0, max_length=20)
    for kind in ("caption_to_image", "image_to_caption"):
        built = builder.build(kind, {**ROW, "caption": long}, rng())
        assert len(built.ids) == 20
        assert v.is_visual(torch.from_numpy(built.ids)).sum() == 4
        assert built.ids[-1] == v.eos
        assert built.num_cut == len(encode(tiny, long.strip())) - (20 - 8)
    asked = builder.build("qa", {**ROW, "qa": [{"question": long, "answer": "no"}]}, rng())
    assert len(asked.ids) == 20
    assert asked.ids[-3:].tolist() == [*encode(tiny, "no"), *encode(tiny, "\n"), v.eos][-3:]
    assert asked.answers.sum() == len(encode(tiny, "no"))
    assert len(builder.build("text", {"text": long}, rng()).ids) == 20


def test_further_questions_that_do_not_fit_are_left_out_whole(tiny) -> None:
    first = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, questions_per_image=1).build(
        "qa", ROW, rng()
    )
    short = SequenceBuilder(
        tiny.hf_tokenizer, tiny.vocabulary, questions_per_image=3, max_length=len(first.ids) + 2
    ).build("qa", ROW, rng())
    assert short.ids.tolist() == first.ids.tolist()
    assert short.num_cut > 0


def test_an_image_that_cannot_fit_names_the_setting(tiny) -> None:
    builder = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, max_length=7)
    with pytest.raises(ConfigError, match=r"mllm\.max_length"):
        builder.build("caption_to_image", ROW, rng())


def test_codes_beyond_the_vocabulary_name_the_image(builder) -> None:
    with pytest.raises(
        VocabularyError, match=r"image x holds visual ids up to 24, but this model has 24"
    ):
        builder.build("caption_to_image", {**ROW, "codes": np.array([0, 24])}, rng())
    with pytest.raises(VocabularyError, match="no visual codes"):
        builder.build("caption_to_image", {**ROW, "codes": np.array([], dtype=np.int32)}, rng())


@pytest.mark.parametrize(
    "text", ["see <IMG_3> here", "<eos>", "<start_of_image><IMG_1><end_of_image>", "<bos><<eos>>"]
)
def test_tokens_written_out_in_text_stay_text(tiny, text: str) -> None:
    ids = tiny.text(text)
    assert ids
    assert all(i not in tiny.text.reserved for i in ids)
    kept = tiny.hf_tokenizer.decode(ids).replace(" ", "")
    assert kept == text.replace(" ", "")


def test_collate_pads_on_the_right(tiny, builder) -> None:
    one = builder.build("caption_to_image", ROW, rng())
    two = builder.build("qa", ROW, rng())
    batch = collate([one, two], tiny.vocabulary.pad)
    longest = max(len(one.ids), len(two.ids))
    assert batch["input_ids"].shape == (2, longest)
    for row, built in enumerate((two, one)):  # the longest first
        length = len(built.ids)
        assert batch["input_ids"][row, :length].tolist() == built.ids.tolist()
        assert batch["labels"][row, :length].tolist() == built.labels.tolist()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert (batch["input_ids"][row, length:] == tiny.vocabulary.pad).all()


def test_packed_sequences_and_isolated_questions_are_computed_as_if_alone(tiny) -> None:
    """Every document of a packed batch, and every question of one, has the logits that it has by
    itself.
    """
    builder = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, questions_per_image=3)
    kinds = ["caption_to_image", "qa", "image_to_caption", "caption_to_image", "qa"]
    sequences = [builder.build(kind, ROW, rng(seed)) for seed, kind in enumerate(kinds)]
    batch = collate(sequences, tiny.vocabulary.pad)
    assert len(batch["input_ids"]) < len(sequences)
    logits = logits_of(tiny, batch)
    found = 0
    for sequence in sequences:
        row, start = place_of(batch, sequence)
        own = logits[row, start : start + len(sequence.ids)]
        for segment in range(int(sequence.segments.max()) + 1):
            here = torch.from_numpy((sequence.segments == 0) | (sequence.segments == segment))
            alone = torch.from_numpy(sequence.ids)[here][None]
            inputs = tiny.model.inputs_embeds(alone)
            expected = tiny.model.lm.get_output_embeddings()(
                tiny.model.backbone(inputs_embeds=inputs).last_hidden_state
            )
            torch.testing.assert_close(own[here], expected[0], atol=1e-5, rtol=1e-5)
            found += 1
    assert found == 3 + 2 * 4


def place_of(batch: dict[str, torch.Tensor], sequence) -> tuple[int, int]:
    """Where a sequence lies in a packed batch: its document begins there with its ids."""
    for row in range(len(batch["input_ids"])):
        for document in range(int(batch["document_ids"][row].max()) + 1):
            places = (batch["document_ids"][row] == document).nonzero().flatten()
            if batch["input_ids"][row, places].tolist() == sequence.ids.tolist():
                assert batch["labels"][row, places].tolist() == sequence.labels.tolist()
                return row, int(places[0])
    raise AssertionError("a sequence is lost")


def test_a_segment_does_not_follow_from_the_one_before(tiny) -> None:
    packed = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, questions_per_image=3).build(
        "qa", ROW, rng()
    )
    starts = [int(np.flatnonzero(packed.segments == segment)[0]) for segment in (1, 2, 3)]
    assert packed.labels[starts[0]] == packed.ids[starts[0]]
    assert [int(packed.labels[start]) for start in starts[1:]] == [IGNORE, IGNORE]
    assert len({int(packed.positions[start]) for start in starts}) == 1


def test_chained_questions_see_each_other_when_asked_for(tiny) -> None:
    chained = SequenceBuilder(
        tiny.hf_tokenizer, tiny.vocabulary, questions_per_image=3, isolate_questions=False
    )
    packed = chained.build("qa", ROW, rng())
    assert not packed.segments.any() and packed.positions.tolist() == list(range(len(packed.ids)))
    assert "segment_ids" not in collate([packed], tiny.vocabulary.pad)


@torch.no_grad()
def logits_of(tiny, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = tiny.model.backbone(
        inputs_embeds=tiny.model.inputs_embeds(batch["input_ids"]),
        attention_mask=visible_mask(batch["document_ids"], batch["segment_ids"], torch.float32),
        position_ids=batch["position_ids"],
    ).last_hidden_state
    return tiny.model.lm.get_output_embeddings()(hidden)


def test_codes_of_a_seen_image_need_not_be_predicted(tiny) -> None:
    builder = SequenceBuilder(tiny.hf_tokenizer, tiny.vocabulary, dense_images=False)
    seen = builder.build("image_to_caption", ROW, rng())
    visual = tiny.vocabulary.is_visual(torch.from_numpy(seen.ids)).numpy()
    assert visual.sum() == len(CODES) and (seen.labels[visual] == IGNORE).all()
    assert (seen.labels[~visual][1:] == seen.ids[~visual][1:]).all()
    drawn = builder.build("caption_to_image", ROW, rng(3))
    assert (drawn.labels[1:] == drawn.ids[1:]).all()
