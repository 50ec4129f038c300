"""The evaluation stage: exact scores in a small planted world, and a real run on tiny models with
resume and skip.

Covers: workflows/evaluation/scores/models.py, workflows/evaluation/scores/questions.py,
workflows/evaluation/scores/reconstruction.py, workflows/evaluation/scores/retrieval.py,
workflows/evaluation/scores/zero_shot.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from smalti import artifact, shards
from smalti.artifact import Artifact
from smalti.config import with_overrides
from smalti.errors import ArtifactError, DataError
from smalti.schema import (
    EncoderTrain,
    EvaluateSection,
    LanguageModel,
    MllmSection,
    PixelStage,
    Recipe,
    SemanticStage,
    TokenizerSection,
    VitSize,
)
from smalti.workflows.evaluation import stage as evaluate
from smalti.workflows.evaluation.scores.heldout import EvaluationJob, HeldOut
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.zero_shot import ZeroShot

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}
PALETTE = np.array([(128, 128, 128), *COLORS.values()], dtype=np.uint8)
SIZE, GRID, TOKENS = 32, (4, 4), 16
OFFSET = 0.25  # planted error of the semantic-only decoder, in [-1, 1]


@dataclasses.dataclass
class Item:
    """An image of the world: a block of 2 x 2 patches in the colour of its label on grey."""

    image_id: str
    label: str
    codes: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        return PALETTE[self.codes.reshape(GRID)].repeat(8, 0).repeat(8, 1)

    @property
    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return buffer.getvalue()

    @property
    def qa(self) -> list[dict[str, str]]:
        return [
            {"question": "What color is it?", "answer": self.label},
            {"question": "Is it red?", "answer": "yes" if self.label == "red" else "no"},
        ]


def items(count: int, seed: int, split: str) -> list[Item]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        label = list(COLORS)[number % 3]
        codes = np.zeros(GRID, dtype=np.int32)
        y, x = rng.integers(0, 3, size=2)
        codes[y : y + 2, x : x + 2] = 1 + number % 3
        made.append(Item(f"{split}-{number}", label, codes.reshape(-1)))
    return made


def write_split(
    corpus: str, tokens: str, split: str, found: list[Item], codes: np.ndarray, per_shard: int = 20
) -> None:
    """Corpus and token shards of a split; captions stand for labels."""
    for index, start in enumerate(range(0, len(found), per_shard)):
        some, key = found[start : start + per_shard], shards.shard_key(split, index)
        text: dict[str, Any] = {
            "image_id": [item.image_id for item in some],
            "caption": [f"a {item.label} block" for item in some],
            "label": [item.label for item in some],
            "qa": [item.qa for item in some],
        }
        size: list[int] = [SIZE] * len(some)
        rows = text | {
            "image": [item.png for item in some],
            "width": size,
            "height": size,
            "source": ["x"] * len(some),
        }
        shards.write_shard(
            corpus, key, pa.table({n: rows[n] for n in shards.CORPUS.names}, schema=shards.CORPUS)
        )
        schema = shards.token_schema((TOKENS,))
        arrays = {
            "codes": shards.list_column(codes[start : start + per_shard].astype(np.int32)),
            **{name: pa.array(text[name], schema.field(name).type) for name in text},
        }
        shards.write_shard(
            tokens, key, pa.table([arrays[name] for name in schema.names], schema=schema)
        )


@pytest.fixture(scope="module", autouse=True)
def _one_core() -> Iterator[None]:
    """Tests share the machine: one torch thread, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "cores", lambda: 1)
        yield


TRAIN, VAL = items(90, 0, "train"), items(45, 1, "val")


# --- a planted world: the tokenizer is a palette, the language model an oracle with known faults --


class PaletteTokenizer:
    """One code a colour; decodes exactly, and with a known error from the semantic codes alone."""

    grid, num_codes, num_sub, num_semantic, image_size, has_semantic_only = (
        GRID,
        4,
        1,
        4,
        SIZE,
        True,
    )
    code_shape = ()  # one code per token

    def decode(self, codes_BT: Tensor) -> Tensor:
        bhwc = PALETTE[codes_BT.numpy().reshape(-1, *GRID)].repeat(8, 1).repeat(8, 2)
        return torch.from_numpy(bhwc).permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode_semantic_only(self, codes_BT: Tensor) -> Tensor:
        exact = self.decode(codes_BT)
        return torch.where(exact > 0, exact - OFFSET, exact + OFFSET)


class EmbeddingTokenizer(PaletteTokenizer):
    """One that keeps the colour of an image among its codes, but takes blue for green."""

    def pooled(self, codes_BT: Tensor) -> Tensor:
        names = [list(COLORS)[int(codes.max()) - 1].replace("blue", "green") for codes in codes_BT]
        return ColorEncoder().prompt_embeddings(names)


class Oracle:
    """Names the colour rightly and says `yes` to everything else; draws blue for green."""

    def ask_codes(self, codes_BT: Tensor, questions: list[str], *_: Any) -> list[str]:
        colors = list(COLORS)
        return [
            f" {colors[int(codes.max()) - 1].upper()}. " if "color" in question else "yes"
            for codes, question in zip(codes_BT, questions, strict=True)
        ]

    def draw_codes(self, prompts: list[str], **_: Any) -> Tensor:
        drawn = []
        for prompt in prompts:
            color = next(color for color in COLORS if color in prompt)
            drawn.append(
                next(
                    item.codes
                    for item in TRAIN
                    if item.label == ("blue" if color == "green" else color)
                )
            )
        return torch.from_numpy(np.stack(drawn)).long()


class ColorEncoder:
    """An encoder whose embedding of an image is its mean colour, and of a sentence the colour that
    it names.
    """

    image_size = SIZE

    def pooled(self, pixels_BCHW: Tensor) -> Tensor:
        return pixels_BCHW.mean((2, 3)) - pixels_BCHW.mean((1, 2, 3))[:, None]

    def prompt_embeddings(self, texts: list[str]) -> Tensor:
        found = [
            next(
                (np.array(rgb, float) for color, rgb in COLORS.items() if color in text), np.ones(3)
            )
            for text in texts
        ]
        centred = torch.tensor(np.stack([rgb - rgb.mean() for rgb in found]))
        return torch.nn.functional.normalize(centred.float(), dim=-1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[HeldOut, Models]:
    corpus, tokens = str(tmp_path_factory.mktemp("corpus")), str(tmp_path_factory.mktemp("tokens"))
    for split, found in (("train", TRAIN), ("val", VAL)):
        write_split(corpus, tokens, split, found, np.stack([item.codes for item in found]))
    job = EvaluationJob(
        path=str(tmp_path_factory.mktemp("evaluation")), corpus=corpus, tokens=tokens, tokenizer="", encoder="",
        encoder_layer=-1, export="here", image_size=SIZE, max_pixels=10**6, seed=0,
        evaluate=EvaluateSection(batch_size=8, drawings=2),
    )  # fmt: skip
    data = HeldOut(job)
    models = Models(data)
    vars(models).update(tokenizer=PaletteTokenizer(), language=Oracle(), encoder=ColorEncoder())
    return data, models


def take(name: str, planted: tuple[HeldOut, Models]) -> MeasureResult:
    return evaluate.MEASURES[name].compute(*planted)


def test_psnr_of_a_planted_error(planted: tuple[HeldOut, Models]) -> None:
    scores = take("reconstruction", planted).scores
    assert scores["reconstruction/psnr"].value == 100.0  # exact copies, bounded
    assert scores["reconstruction/ssim"].value == pytest.approx(1.0)
    expected = 20 * math.log10(2 / OFFSET)
    assert scores["reconstruction/psnr_semantic_only"].value == pytest.approx(expected, abs=1e-3)
    assert scores["reconstruction/psnr_over_semantic_only"].value == pytest.approx(
        100 - expected, abs=1e-3
    )
    assert {score.n for score in scores.values()} == {45}


def test_reconstruction_grid_belongs_to_its_images(planted: tuple[HeldOut, Models]) -> None:
    result = take("reconstruction", planted)
    by_id = {item.image_id: item for item in VAL}
    assert len(result.tables["grid"]) == 16
    for line in result.tables["grid"]:
        assert np.array_equal(result.pictures[line["input"]], by_id[line["image_id"]].pixels)
        assert np.array_equal(result.pictures[line["decoded"]], by_id[line["image_id"]].pixels)
        assert line["psnr"] == 100.0


def test_codes_are_counted_over_all_held_out_tokens(planted: tuple[HeldOut, Models]) -> None:
    result = take("codes", planted)
    share = np.array([12, 4 / 3, 4 / 3, 4 / 3]) / 16
    entropy = -(share * np.log(share)).sum()
    assert result.scores["codes/usage"].value == 1.0
    assert result.scores["codes/usage"].n == 45 * TOKENS
    assert result.scores["codes/entropy"].value == pytest.approx(entropy)
    assert result.scores["codes/semantic_perplexity"].value == pytest.approx(math.exp(entropy))
    vrr = result.scores["codes/vrr"]
    assert vrr.value == pytest.approx(1.0)  # all patches of a colour are alike
    assert abs(vrr.baseline["shuffled"]) < 0.3
    assert result.tables["gallery_of"] == "semantic"
    assert sorted(line["code"] for line in result.tables["gallery"]) == [0, 1, 2, 3]


def test_questions_are_scored_beside_the_question_only_answer(
    planted: tuple[HeldOut, Models],
) -> None:
    result = take("questions", planted)
    score = result.scores["qa/accuracy"]
    assert score.n == 90
    assert score.value == pytest.approx((45 + 15) / 90)  # every colour, and `yes` where it is red
    assert score.baseline["question_only"] == pytest.approx(
        (15 + 30) / 90
    )  # blue (ties: alphabet), no
    kinds = {row["key"]: row for row in result.tables["questions"]["by_kind"]}
    assert kinds["other"]["accuracy"] == 1.0
    assert kinds["yes / no"]["accuracy"] == pytest.approx(1 / 3)
    examples = result.tables["examples"]
    assert sum(not line["right"] for line in examples) == 12
    assert all(
        line["given"] == "yes" and line["answer"] == "no" for line in examples if not line["right"]
    )


def test_drawings_are_judged_by_both_judges(planted: tuple[HeldOut, Models]) -> None:
    result = take("drawing", planted)
    assert result.scores["drawing/accuracy"].value == pytest.approx(2 / 3)  # green comes out blue
    assert result.scores["drawing/accuracy"].n == 6
    assert result.scores["drawing/accuracy"].baseline == {
        "chance": pytest.approx(1 / 3),
        "reconstructed": 1.0,
    }
    assert result.scores["drawing/judge_accuracy"].value == 1.0
    assert result.scores["drawing/zero_shot_accuracy"].value == pytest.approx(2 / 3)
    wrong = [line for line in result.tables["drawings"] if line["seen"]["judge"] != line["label"]]
    assert {line["prompt"] for line in wrong} == {"a green block"}
    assert {line["seen"]["judge"] for line in wrong} == {"blue"}


def test_without_a_decoder_what_needs_pixels_is_skipped_with_the_reason(
    planted: tuple[HeldOut, Models],
) -> None:
    class Undecodable(PaletteTokenizer):
        has_decoder, no_decoder = False, "no decoder here"

        def decode(self, codes_BT: Tensor) -> Tensor:
            raise AssertionError("asked for pixels")

    class Drawer(Oracle):
        cannot_draw: str | None = "no decoder here"

        def decode(self, codes_BT: Tensor) -> list[Image.Image]:
            return [
                Image.fromarray(PALETTE[row.numpy().reshape(GRID)].repeat(8, 0).repeat(8, 1))
                for row in codes_BT
            ]

    models, drawer = Models(planted[0]), Drawer()
    vars(models).update(vars(planted[1]) | {"tokenizer": Undecodable(), "language": drawer})
    for name in ("reconstruction", "drawing"):
        result = evaluate.MEASURES[name].compute(planted[0], models)
        assert result.skipped == "no decoder here" and not result.scores and not result.pictures
    for name in ("codes", "questions", "zero_shot"):
        assert evaluate.MEASURES[name].compute(planted[0], models).scores
    drawer.cannot_draw = (
        None  # a diffusion decoder stands by: what is drawn is judged, reconstructions are not made
    )
    drawn = evaluate.MEASURES["drawing"].compute(planted[0], models).scores["drawing/accuracy"]
    assert (
        drawn.value == take("drawing", planted).scores["drawing/accuracy"].value
        and "reconstructed" not in drawn.baseline
    )


def test_zero_shot_names_every_colour(planted: tuple[HeldOut, Models]) -> None:
    result = take("zero_shot", planted)
    assert result.scores["zero_shot/accuracy"].value == 1.0
    assert result.scores["zero_shot/accuracy"].baseline["most_frequent"] == pytest.approx(1 / 3)
    assert ZeroShot(planted[1]).labels == ["blue", "green", "red"]


def test_a_tokenizer_that_keeps_embeddings_is_measured_through_its_codes(
    planted: tuple[HeldOut, Models],
) -> None:
    """One of three colours is lost: a third of the images, and of the captions."""
    data, models = HeldOut(planted[0].job), Models(planted[0])
    vars(models).update(tokenizer=EmbeddingTokenizer(), encoder=ColorEncoder())
    scores = evaluate.MEASURES["zero_shot"].compute(data, models).scores
    assert scores["zero_shot/through_codes"].value == pytest.approx(2 / 3)
    assert scores["zero_shot/through_codes"].baseline == {"encoder": 1.0}
    vars(data)["images"] = [
        next(row for row in planted[0].rows if row.label == color) for color in COLORS
    ]
    scores = evaluate.MEASURES["retrieval"].compute(data, models).scores
    assert scores["retrieval/i2t_r1_through_codes"].value == pytest.approx(2 / 3)
    assert (
        scores["retrieval/i2t_r1_through_codes"].baseline["encoder"]
        == scores["retrieval/i2t_r1"].value
        == 1.0
    )


def test_retrieval_is_not_taken_where_captions_repeat(planted: tuple[HeldOut, Models]) -> None:
    result = take("retrieval", planted)
    assert result.scores == {}
    assert "3 distinct captions" in (result.skipped or "")


def test_retrieval_finds_captions_of_their_own(planted: tuple[HeldOut, Models]) -> None:
    data, models = HeldOut(planted[0].job), planted[1]
    chosen = [next(row for row in planted[0].rows if row.label == color) for color in COLORS]
    vars(data)["images"] = chosen
    scores = evaluate.MEASURES["retrieval"].compute(data, models).scores
    assert scores["retrieval/i2t_r1"].value == 1.0
    assert scores["retrieval/t2i_r1"].value == 1.0
    assert scores["retrieval/t2i_r1"].baseline == {"chance": pytest.approx(1 / 3)}


def test_samples_follow_the_settings(planted: tuple[HeldOut, Models]) -> None:
    few = dataclasses.replace(planted[0].job, evaluate=EvaluateSection(images=7, questions=5))
    data = HeldOut(few)
    assert len(data.images) == 7
    assert len(data.questions) == 5
    assert [row.image_id for row in HeldOut(few).images] == [row.image_id for row in data.images]


def test_without_labels_captions_and_questions_only_pixels_are_measured(tmp_path: Path) -> None:
    corpus, tokens = str(tmp_path / "corpus"), str(tmp_path / "tokens")
    write_split(corpus, tokens, "val", VAL, np.stack([item.codes for item in VAL]))
    for key in shards.list_shards(tokens, "val"):
        table = shards.read_shard(tokens, key)
        for name in ("caption", "label", "qa"):
            index = table.schema.get_field_index(name)
            table = table.set_column(
                index, table.schema.field(name), pa.nulls(len(table), table.schema.field(name).type)
            )
        shards.write_shard(tokens, key, table)
    job = EvaluationJob("", corpus, tokens, "", "", -1, "here", SIZE, 10**6, 0, EvaluateSection())
    data = HeldOut(job)
    models = Models(data)
    vars(models).update(tokenizer=PaletteTokenizer(), language=Oracle(), encoder=ColorEncoder())
    results = {name: measure.compute(data, models) for name, measure in evaluate.MEASURES.items()}
    assert {name for name, result in results.items() if result.skipped} == {
        "zero_shot",
        "retrieval",
        "questions",
        "drawing",
    }
    assert "reconstruction/psnr" in results["reconstruction"].scores


def test_nothing_held_out_is_an_error(tmp_path: Path) -> None:
    corpus, tokens = str(tmp_path / "corpus"), str(tmp_path / "tokens")
    write_split(corpus, tokens, "train", TRAIN, np.stack([item.codes for item in TRAIN]))
    job = EvaluationJob("", corpus, tokens, "", "", -1, None, SIZE, 10**6, 0, EvaluateSection())
    with pytest.raises(DataError, match="val_fraction"):
        _ = HeldOut(job).images


def test_tokens_of_another_corpus_are_refused(
    planted: tuple[HeldOut, Models], tmp_path: Path
) -> None:
    others = [dataclasses.replace(item, image_id=f"other-{item.image_id}") for item in VAL]
    write_split(
        str(tmp_path / "corpus"),
        str(tmp_path / "tokens"),
        "val",
        others,
        np.stack([i.codes for i in others]),
    )
    job = dataclasses.replace(planted[0].job, tokens=str(tmp_path / "tokens"))
    data = HeldOut(job)
    with pytest.raises(DataError, match="another corpus"):
        data.pixels(data.images)


# --- a real run on tiny models --------------------------------------------------------------------


def make(out: Path, name: str, config: dict[str, Any] | None = None) -> artifact.Workspace:
    place = artifact.begin(str(out / name), name, config or {}, {})
    assert isinstance(place, artifact.Workspace)
    return place


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The output folder of a chain up to its export: real SigLIP, SemHiTok and Qwen2 of tiny sizes,
    random weights.
    """
    from smalti.mllm.bpe import train_bpe
    from smalti.mllm.build import build_unified
    from smalti.mllm.export import export
    from smalti.tokenizers.encoders import VisionEncoder
    from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok
    from smalti.tokenizers.siglip import build_siglip

    out = tmp_path_factory.mktemp("chain")
    siglip = out / "stand-in"
    vit = VitSize(dim=16, layers=1, heads=2, mlp_ratio=2)
    pixel = PixelStage(codes=3, dim=4, encoder=vit, decoder=vit, semantic_only_decoder=True)
    section = TokenizerSection(
        semantic=SemanticStage(dim=6, decoder_dim=16, decoder_heads=2, decoder_layers=1),
        pixel=pixel,
    )
    size = EncoderTrain(
        patch_size=8, hidden_size=24, layers=1, heads=2, text_layers=1, text_length=6
    )
    words = [f"a {color} block" for color in COLORS] * 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = train_bpe(words, 290)
        build_siglip(size, SIZE, len(text), text.pad_token_id, text.eos_token_id).save_pretrained(
            siglip
        )
        text.save_pretrained(siglip)
        encoder = VisionEncoder.from_pretrained(str(siglip))
        semantic = SemanticTokenizer(24, section.semantic, 8, GRID)
        semantic.init_from(torch.randn(8, 24))
        tokenizer = SemHiTok(
            section, PixelTokenizer(pixel, semantic.codes, SIZE, GRID), semantic, encoder
        )
    made = make(out, "tokenizer")
    tokenizer.save_pretrained(made.path)
    made.finish({"codes": 24}, 1.0)
    make(out, "encoder", {"pretrained": str(siglip)}).finish({"dim": 24}, 1.0)
    corpus, tokens = make(out, "corpus"), make(out, "tokens")
    for split, found in (("train", TRAIN), ("val", VAL)):
        pixels = (
            torch.from_numpy(np.stack([item.pixels for item in found])).permute(0, 3, 1, 2).float()
            / 127.5
            - 1
        )
        write_split(corpus.path, tokens.path, split, found, tokenizer.encode(pixels).numpy())
    corpus.finish({"train": 90, "val": 45}, 1.0)
    tokens.finish({"images": 135}, 1.0)
    settings = MllmSection(
        config=LanguageModel(
            hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=64, text_vocab_size=290
        ),
        max_length=64,
    )
    hf_tokenizer = train_bpe(words, 290)
    model = build_unified(settings, hf_tokenizer, tokenizer, seed=0)
    exported = make(out, "export")
    export(model, hf_tokenizer, str(out / "tokenizer"), exported.path)
    exported.finish({"codes": 24}, 1.0)
    recipe = Recipe(name="tiny", out=str(out))
    changes = {
        "tracking.uri": "off",
        "evaluate.questions": 20,
        "corpus.image_size": SIZE,
        "evaluate.batch_size": 16,
    }
    return with_overrides(
        recipe, {**changes, "evaluate.goals": {"qa/accuracy": 0.9, "never/measured": 1.0}}
    )


@pytest.fixture(scope="module")
def evaluated(chain: Recipe) -> Artifact:
    return evaluate.run(chain)


def test_a_run_takes_every_measure_that_there_is(evaluated: Artifact) -> None:
    expected = {
        "reconstruction/psnr", "reconstruction/ssim", "reconstruction/psnr_semantic_only", "codes/usage", "codes/perplexity",
        "codes/entropy", "codes/vrr", "codes/semantic_usage", "codes/semantic_vrr", "zero_shot/accuracy", "qa/accuracy",
        "drawing/accuracy", "drawing/zero_shot_accuracy", "drawing/judge_accuracy",
    }  # fmt: skip
    assert expected <= evaluated.scores.keys()
    assert not any(key.startswith("retrieval") for key in evaluated.scores)
    assert evaluated.scores["qa/accuracy"]["n"] == 20
    assert evaluated.scores["qa/accuracy"]["goal"] == 0.9
    assert "never/measured" not in evaluated.scores
    record = json.loads((Path(evaluated.path) / "artifact.json").read_text())
    assert set(record["parents"]) == {"corpus", "encoder", "tokenizer", "tokens", "export"}
    assert "goal" not in record["scores"]["qa/accuracy"]


def test_every_picture_that_a_table_names_is_there(evaluated: Artifact) -> None:
    tables = json.loads((Path(evaluated.path) / "tables.json").read_text())
    named = [line[kind] for line in tables["grid"] for kind in ("input", "semantic", "decoded")]
    named += [name for line in tables["gallery"] for name in line["pictures"]]
    named += [line["picture"] for line in tables["examples"] + tables["drawings"]]
    there = {path.stem for path in (Path(evaluated.path) / "pictures").glob("*.png")}
    assert set(named) == there
    assert len(there) == evaluated.counts["pictures"]


def test_the_same_command_skips_and_goals_change_no_fingerprint(
    chain: Recipe, evaluated: Artifact, monkeypatch
) -> None:
    monkeypatch.setattr(evaluate, "MEASURES", {})  # would give an empty evaluation if it ran
    again = evaluate.run(
        with_overrides(chain, {"evaluate.goals": {"qa/accuracy": 0.1}, "evaluate.batch_size": 3})
    )
    assert again.fingerprint == evaluated.fingerprint
    assert again.scores["qa/accuracy"]["goal"] == 0.1


def test_a_broken_off_evaluation_goes_on_with_what_is_missing(
    chain: Recipe, evaluated: Artifact, monkeypatch
) -> None:
    path = Path(evaluated.path)
    before = (path / "scores.json").read_bytes()
    record = json.loads((path / "artifact.json").read_text())
    partial = {key: record[key] for key in ("kind", "fingerprint", "config", "parents")} | {
        "seconds": 5.0
    }
    (path / "artifact.partial.json").write_text(json.dumps(partial))
    for name in (
        "artifact.json",
        "scores.json",
        "tables.json",
        "measures/drawing.json",
        "measures/codes.json",
    ):
        (path / name).unlink()
    taken = []
    original = evaluate.Evaluator.measure
    monkeypatch.setattr(
        evaluate.Evaluator,
        "measure",
        lambda self, name, one: (taken.append(name), original(self, name, one))[1],
    )
    resumed = evaluate.run(chain)
    assert taken == ["codes", "drawing"]
    assert (path / "scores.json").read_bytes() == before
    assert resumed.fingerprint == evaluated.fingerprint


@pytest.mark.parametrize(
    "folder", ["evaluation", "evaluate"]
)  # of an earlier version, and of this one
def test_scores_of_baseline_runs_are_added(chain: Recipe, evaluated: Artifact, folder: str) -> None:
    recipe = with_overrides(
        chain, {"baselines": {"pixel_codes": {"tokenizer.guidance": False}, "absent": {}}}
    )
    beside = make(Path(chain.out), f"baselines/pixel_codes/{folder}")
    beside.finish(
        {"scores": 1},
        1.0,
        scores={"qa/accuracy": {"value": 0.5, "n": 20}, "codes/usage": {"value": 0.25, "n": 9}},
    )
    scores = evaluate.run(recipe).scores
    assert scores["qa/accuracy"]["baseline"]["pixel_codes"] == 0.5
    assert "question_only" in scores["qa/accuracy"]["baseline"]
    assert scores["codes/usage"]["baseline"] == {"pixel_codes": 0.25}


def test_a_finished_evaluation_takes_only_a_measure_that_was_added(
    chain: Recipe,
    evaluated: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(evaluated.path)
    files = {file: file.stat().st_mtime_ns for file in path.rglob("measures/*.json")}

    def count_rows(data: HeldOut, models: Models) -> MeasureResult:
        return MeasureResult({"own/rows": Score(float(len(data.rows)), len(data.rows))})

    measures = evaluate.MEASURES | {"own": evaluate.Measure(count_rows)}
    monkeypatch.setattr(evaluate, "MEASURES", measures)
    first = evaluate.run(chain)
    output = "".join(capsys.readouterr())
    assert first.scores["own/rows"]["value"] == 45
    assert first.scores.keys() == evaluated.scores.keys() | {"own/rows"}
    assert first.fingerprint == evaluated.fingerprint
    assert first.counts["scores"] == evaluated.counts["scores"] + 1
    assert {file: file.stat().st_mtime_ns for file in files} == files, (
        "a finished measure was taken again"
    )
    assert (
        "reusing finished measures: reconstruction, codes, zero_shot, retrieval, questions, drawing"
        in output
    )
    assert "own (" in output and "own/rows 45" in output
    assert "own/rows" in json.loads((path / "scores.json").read_text())
    assert Artifact.load(evaluated.path).scores["own/rows"]["value"] == 45
    evaluate.run(chain)
    assert "own (" not in "".join(capsys.readouterr())
    monkeypatch.setitem(measures, "own", evaluate.Measure(count_rows, version=2))
    evaluate.run(chain)
    assert "own (" in "".join(capsys.readouterr())


def test_a_record_that_lacks_scores_of_finished_measures_is_completed(
    chain: Recipe, evaluated: Artifact
) -> None:
    """An addition was interrupted after its result was written, before the record was."""
    wanted = Artifact.load(evaluated.path).scores
    without = {key: score for key, score in wanted.items() if not key.startswith("codes/")}
    dataclasses.replace(Artifact.load(evaluated.path), scores=without).save()
    assert evaluate.run(chain).scores.keys() >= evaluated.scores.keys()
    assert evaluated.scores.keys() <= Artifact.load(evaluated.path).scores.keys()


def test_a_missing_stage_is_named(chain: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="corpus"):
        evaluate.run(with_overrides(chain, {"out": str(tmp_path)}))
