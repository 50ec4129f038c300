"""Measures with known answers: planted errors, counted codes, toy images that a judge can tell
apart.

Covers: workflows/evaluation/scores/answers.py, workflows/evaluation/scores/codes.py,
workflows/evaluation/scores/contact_sheet.py, workflows/evaluation/scores/drawing.py,
workflows/evaluation/scores/heldout.py, workflows/evaluation/scores/judge.py,
workflows/evaluation/scores/measure_result.py, workflows/evaluation/scores/patches.py,
workflows/evaluation/scores/pixels.py, workflows/evaluation/scores/tables.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from smalti.errors import DataError
from smalti.schema import DualStage, EvaluateSection, VitSize
from smalti.tokenizers.dualtoken import DualModel, DualToken
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.metrics import code_counts
from smalti.workflows.evaluation.scores.answers import (
    QuestionOnly,
    answer_kind,
    breakdown,
    normalise,
    opening,
    same_answer,
)
from smalti.workflows.evaluation.scores.codes import count_scores, histogram, levels_of
from smalti.workflows.evaluation.scores.contact_sheet import contact_sheet
from smalti.workflows.evaluation.scores.drawing import named_label, prompts_of
from smalti.workflows.evaluation.scores.heldout import EvaluationJob, HeldOut, choose, spread
from smalti.workflows.evaluation.scores.judge import Judge, train_judge, training_steps
from smalti.workflows.evaluation.scores.measure_result import (
    MeasureResult,
    Score,
    load_result,
    merge_baselines,
    png,
    save_result,
)
from smalti.workflows.evaluation.scores.patches import cut_patches, gallery, in_context
from smalti.workflows.evaluation.scores.pixels import thumbnail, to_model, to_uint8


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Yes.", "yes"),
        ("  The   Blue circle! ", "blue circle"),
        ("3.5", "3.5"),
        ("-2", "-2"),
        ("t-shirt,", "t-shirt"),
        ("50%", "50%"),
        ("a", "a"),  # an article alone is an answer (a letter), not nothing
        ("?!", "?!"),
        ("Ärger", "ärger"),
    ],
)
def test_normalise(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_different_answers_stay_different() -> None:
    assert same_answer("a teal circle", "Teal circle.")
    assert not same_answer("teal", "teal circle")
    assert not same_answer("", "yes")
    assert not same_answer("-2", "2")


def test_answer_kinds_and_openings() -> None:
    assert [answer_kind(text) for text in ("Yes", "no.", "12", "3.5", "teal")] == [
        "yes / no"
    ] * 2 + ["number"] * 2 + ["other"]
    assert opening("What colour is it?") == "what colour"
    assert opening("Why?") == "why"


def test_question_only_gives_the_most_frequent_answer_of_the_question() -> None:
    guesser = QuestionOnly()
    assert guesser.answer("anything?") is None
    guesser.learn(
        [("What color?", "red"), ("what color", "Red."), ("What color?", "blue"), ("Is it?", "yes")]
        + [("Is?", "no")] * 9
    )
    assert guesser.answer("WHAT COLOR?") == "red"
    assert guesser.answer("Is it?") == "yes"
    assert guesser.answer("never seen") == "no"  # the most frequent answer of all
    guesser.learn([("tie", "b"), ("tie", "a")])
    assert guesser.answer("tie") == "a"  # the order of the data must not decide


def test_breakdown_counts_every_question_once() -> None:
    keys = ["x"] * 6 + ["y"] * 3 + ["z", "w", "v"]
    hits = [True, True, True, False, False, False] + [True] * 3 + [False, True, False]
    rows = breakdown(keys, hits, [False] * len(keys), most=2)
    assert [row["key"] for row in rows] == ["x", "y", "all others"]
    assert [row["n"] for row in rows] == [6, 3, 3]
    assert [row["accuracy"] for row in rows] == [0.5, 1.0, pytest.approx(1 / 3)]
    assert all(row["question_only"] == 0 for row in rows)
    assert "question_only" not in breakdown(keys, hits, None)[0]


def test_named_label_is_the_longest_in_the_prompt() -> None:
    labels = ["circle", "blue circle", "red_fox"]
    assert named_label("a Blue circle, please", labels) == "blue circle"
    assert named_label("a red circle", labels) == "circle"
    assert named_label("The red fox!", labels) == "red_fox"
    assert named_label("circles", labels) is None


# --- samples --------------------------------------------------------------------------------------


def told_of(rows: list[tuple[str | None, str]], own_encoder: bool) -> HeldOut:
    """A job whose training split has these (caption, label) rows."""
    data = HeldOut(
        EvaluationJob(
            "", "", "", "", "", -1, None, 8, 1, 0, EvaluateSection(), own_encoder=own_encoder
        )
    )
    vars(data).update(
        training_texts=[{"caption": caption, "label": label} for caption, label in rows]
    )
    return data


def test_a_label_is_drawn_and_recognised_by_the_text_that_was_trained_with() -> None:
    rows = [
        ("red ball!", "red_ball"),
        (None, "cat"),
        ("Tom asleep", "dog"),
        ("a wet nose", "dog"),
        ("at home", "dog"),
    ]
    data = told_of([*rows, (None, "grey_mouse")], own_encoder=True)
    wanted = {
        "red_ball": "red ball!",
        "cat": "cat",
        "dog": "a photo of a dog",
        "grey_mouse": "grey_mouse",
    }
    assert data.captions_of_labels == data.zero_shot_sentences == wanted
    assert {prompt.label: prompt.text for prompt in prompts_of(data)} == wanted
    other = told_of([*rows, (None, "grey_mouse")], own_encoder=False)
    assert other.captions_of_labels == wanted
    photos = {"cat": "a photo of a cat", "grey_mouse": "a photo of a grey mouse"}
    assert other.zero_shot_sentences == wanted | photos


def test_samples_are_seeded_sorted_and_without_repeats() -> None:
    first = choose(1000, 50, seed=3)
    assert np.array_equal(first, choose(1000, 50, seed=3))
    assert not np.array_equal(first, choose(1000, 50, seed=4))
    assert len(set(first.tolist())) == 50
    assert (np.diff(first) > 0).all()
    assert choose(3, 50, seed=0).tolist() == [0, 1, 2]


def test_spread_keeps_order_and_ends() -> None:
    keys = [f"val/{i:05d}" for i in range(100)]
    some = spread(keys, 7)
    assert len(set(some)) == 7
    assert some == sorted(some)
    assert some[0] == keys[0]
    assert some[-1] == keys[-1]
    assert spread(keys[:3], 7) == keys[:3]


# --- codes and patches ----------------------------------------------------------------------------


def test_code_scores_of_known_counts() -> None:
    scores = count_scores("", np.array([10, 10, 10, 10, 0, 0, 0, 0]))
    assert scores["codes/usage"].value == 0.5
    assert scores["codes/usage"].n == 40
    assert scores["codes/perplexity"].value == pytest.approx(4.0)
    assert scores["codes/entropy"].value == pytest.approx(math.log(4))
    one = count_scores("semantic_", np.array([7, 0]))
    assert one["codes/semantic_perplexity"].value == pytest.approx(1.0)


def test_codes_of_several_depths_are_counted_together_and_patches_go_by_the_first() -> None:
    tower = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    stage = DualStage(
        codes=5,
        depth=3,
        pixel_layers=[1],
        pixel_weights=[1.0],
        decoder=VitSize(dim=8, layers=1, heads=1),
    )
    tokenizer = DualToken(DualModel(stage, VisionEncoder(SiglipVisionModel(tower), -2)))
    codes = np.random.default_rng(0).integers(0, 5, (2, 4, 2, 3), dtype=np.int32)
    found = levels_of(tokenizer, codes)
    assert list(found) == ["", "semantic_"]
    for book, (first, every, num_codes) in enumerate(found.values()):
        assert first.tolist() == codes[:, :, book, 0].tolist() and num_codes == 5
        counts = code_counts(torch.from_numpy(every), num_codes)
        assert counts.tolist() == [int((codes[:, :, book] == k).sum()) for k in range(5)]


def test_histogram_is_sorted_and_thinned() -> None:
    counts = np.random.default_rng(0).permutation(np.arange(5000))
    found = histogram(counts)
    assert found["codes"] == 5000
    assert found["used"] == 4999
    assert found["tokens"] == counts.sum()
    assert found["points"][0] == [1, 4999]
    assert found["points"][-1] == [5000, 0]
    assert len(found["points"]) <= 256


def test_patches_are_cut_in_token_order() -> None:
    bhwc = np.zeros((2, 6, 9, 3), dtype=np.uint8)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                bhwc[image, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] = 10 * (
                    image * 6 + row * 3 + column
                )
    patches = cut_patches(bhwc, (2, 3))
    assert patches.shape == (12, 3, 3, 3)
    assert (patches == (10 * np.arange(12)).reshape(12, 1, 1, 1)).all()


def test_patches_leave_out_what_the_grid_does_not_cover() -> None:
    assert cut_patches(np.zeros((1, 13, 13, 3), dtype=np.uint8), (3, 3)).shape == (9, 4, 4, 3)


def test_gallery_shows_the_planted_code() -> None:
    rng = np.random.default_rng(0)
    bhwc = np.full((10, 16, 16, 3), 90, dtype=np.uint8)
    ids = rng.integers(0, 2, size=(10, 4))
    ids[:, 3] = 7  # the bottom right patch of every image, and it alone has detail
    bhwc[:, 8:, 8:] = rng.integers(0, 255, size=(10, 8, 8, 3))
    lines, pictures = gallery(bhwc, ids, (2, 2), seed=0)
    assert lines[0]["code"] == 7
    assert lines[0]["patches"] == 10
    assert lines[0]["images"] == 10
    assert len(lines[0]["pictures"]) == 8
    assert {line["code"] for line in lines} == {0, 1, 7}
    assert all(name in pictures for line in lines for name in line["pictures"])


def test_gallery_wants_three_images_a_code() -> None:
    lines, pictures = gallery(
        np.zeros((2, 8, 8, 3), dtype=np.uint8), np.zeros((2, 4), dtype=int), (2, 2), seed=0
    )
    assert lines == []
    assert pictures == {}


def test_patch_stands_in_the_middle_of_its_picture() -> None:
    hwc = np.zeros((16, 16, 3), dtype=np.uint8)
    hwc[8:12, 4:8] = (255, 0, 0)  # token 9 of a 4 by 4 grid
    picture = in_context(hwc, (4, 4), 9)
    assert picture.shape[0] == picture.shape[1] == 96
    assert tuple(picture[48, 48]) == (255, 0, 0)
    assert picture[2, 2].max() < 128  # the dimmed surrounding


# --- judge ----------------------------------------------------------------------------------------


def toy_images(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Red or blue discs or bars of 32 px on grey noise, labelled `red disc` and so on."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:32, :32]
    images, labels = [], []
    for _ in range(count):
        color, shape = rng.integers(0, 2, size=2)
        y, x = rng.integers(10, 22, size=2)
        mask = (
            (yy - y) ** 2 + (xx - x) ** 2 < 49 if shape else (abs(yy - y) < 3) & (abs(xx - x) < 9)
        )
        image = rng.integers(110, 140, size=(32, 32, 3))
        image[mask] = (210, 40, 40) if color else (40, 60, 210)
        images.append(image.astype(np.uint8))
        labels.append(f"{'red' if color else 'blue'} {'disc' if shape else 'bar'}")
    return np.stack(images), labels


def test_judge_learns_images_that_can_be_told_apart() -> None:
    judge = train_judge(*toy_images(240, 0), seed=0)
    images, labels = toy_images(80, 1)
    given = judge.classify(to_model(images))
    assert np.mean([one == other for one, other in zip(given, labels, strict=True)]) >= 0.95


def test_judge_of_noise_labels_knows_nothing() -> None:
    images, labels = toy_images(128, 0)
    shuffled = np.random.default_rng(5).permutation(labels).tolist()
    judge = train_judge(images, shuffled, seed=0)
    held, right = toy_images(200, 1)
    right = np.random.default_rng(6).permutation(right).tolist()
    assert (
        np.mean(
            [one == other for one, other in zip(judge.classify(to_model(held)), right, strict=True)]
        )
        < 0.45
    )


def test_judge_is_seeded_and_leaves_the_random_state() -> None:
    images, labels = toy_images(40, 0)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one, other = train_judge(images, labels, seed=1), train_judge(images, labels, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    pixels = to_model(images)
    assert torch.equal(one(pixels), other(pixels))


def test_judge_scores_labels_by_their_words_and_places() -> None:
    judge = Judge(["red on blue", "blue on red", "red"], 16)
    members = judge.members_LW
    assert members.shape[0] == 3
    assert len({tuple(row.tolist()) for row in members}) == 3
    assert members.sum(1).tolist() == [3, 3, 1]
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_judge_takes_few_steps_for_few_images() -> None:
    assert training_steps(1) == 1
    assert training_steps(64) == 40
    assert training_steps(3578) == 300
    assert training_steps(20_000) == math.ceil(5 * 20_000 / 64)


# --- pixels, parts, sheets ------------------------------------------------------------------------


def test_pixels_survive_the_way_there_and_back() -> None:
    bhwc = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = to_model(bhwc)
    assert pixels.shape == (1, 3, 16, 16)
    assert float(pixels.min()) == -1
    assert float(pixels.max()) == 1
    assert np.array_equal(to_uint8(pixels), bhwc)
    assert to_uint8(torch.full((1, 3, 2, 2), 7.0)).max() == 255


def test_thumbnail_never_enlarges() -> None:
    assert thumbnail(np.zeros((64, 32, 3), np.uint8)).shape == (64, 32, 3)
    assert thumbnail(np.zeros((512, 256, 3), np.uint8), 128).shape == (128, 64, 3)


def test_part_is_read_back_as_it_was_written(tmp_path) -> None:
    part = MeasureResult(
        {"a/b": Score(0.5, 10, baseline={"chance": 0.1})},
        {"t": [1]},
        {"p": np.zeros((4, 4, 3), np.uint8)},
    )
    assert load_result(str(tmp_path), "x") is None
    written = save_result(str(tmp_path), "x", part)
    assert load_result(str(tmp_path), "x") == written
    assert written["scores"]["a/b"] == {
        "value": 0.5, "n": 10, "split": "val", "higher_is_better": True, "baseline": {"chance": 0.1},
    }  # fmt: skip
    assert (tmp_path / "pictures" / "p.png").read_bytes() == png(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("bad", [Score(math.inf, 1), Score(0.5, 1, baseline={"x": math.nan})])
def test_a_score_that_is_not_finite_is_refused(bad: Score) -> None:
    with pytest.raises(DataError, match="finite"):
        bad.as_json()


def test_baselines_are_filled_where_both_were_measured() -> None:
    scores = {
        "qa/accuracy": Score(0.9, 5, baseline={"question_only": 0.6}).as_json(),
        "codes/vrr": Score(0.3, 5).as_json(),
    }
    merged = merge_baselines(
        scores, {"pixel_codes": {"qa/accuracy": {"value": 0.7}, "other": {"value": 1.0}}}
    )
    assert merged["qa/accuracy"]["baseline"] == {"question_only": 0.6, "pixel_codes": 0.7}
    assert merged["codes/vrr"]["baseline"] == {}
    assert "other" not in merged
    same = merge_baselines(
        {"zero_shot/accuracy": Score(0.9, 5).as_json()},
        {"x": {"zero_shot/accuracy": {"value": 0.9}}},
    )
    assert same["zero_shot/accuracy"]["baseline"] == {}  # the run shares the encoder
    assert scores["qa/accuracy"]["baseline"] == {
        "question_only": 0.6
    }  # the record itself is left alone


def test_contact_sheet_places_every_picture() -> None:
    red, blue = np.full((8, 8, 3), (255, 0, 0), np.uint8), np.full((6, 4, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([[red, blue], [blue]])
    assert sheet.shape == (2 * 12 + 4, 2 * 12 + 4, 3)
    assert (sheet == (255, 0, 0)).all(-1).sum() == 64
    assert (sheet == (0, 0, 255)).all(-1).sum() == 48
