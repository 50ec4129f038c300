"""The stage on tiny models: every measure, resume, skip, and measures added later.

Covers: workflows/evaluation/tracking.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smalti import artifact
from smalti.artifact import Artifact
from smalti.config import with_overrides
from smalti.errors import ArtifactError
from smalti.schema import (
    EncoderTrain,
    LanguageModel,
    MllmSection,
    PixelStage,
    Recipe,
    SemanticStage,
    TokenizerSection,
    VitSize,
)
from smalti.tokenizers.unicode2 import NO_DECODER
from smalti.tracking import NullTracker
from smalti.workflows.evaluation import stage as evaluate
from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.pipeline.stage import StageRun
from tests.workflows.evaluation.planted_world import COLORS, GRID, SIZE, TRAIN, VAL, write_split


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


# of an earlier version, and of this one
@pytest.mark.parametrize("folder", ["evaluation", "evaluate"])
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


def test_what_does_not_apply_to_the_system_is_skipped_with_its_reason(
    planted: tuple[HeldOut, Models], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(data: HeldOut, models: Models) -> MeasureResult:
        raise AssertionError("asked for pixels")

    monkeypatch.setattr(evaluate, "MEASURES", {"reconstruction": evaluate.Measure(untouched, 3)})
    run = StageRun(
        "evaluate", str(tmp_path), Recipe(system="unicode2"), NullTracker(), False, "0" * 16
    )
    for _ in range(2):  # computed, then found finished
        result = evaluate._take_missing(run, planted[0].job)["reconstruction"]
        assert result["skipped"] == NO_DECODER and result["version"] == 3
        assert not result["scores"] and not result["pictures"]


def test_a_missing_stage_is_named(chain: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="corpus"):
        evaluate.run(with_overrides(chain, {"out": str(tmp_path)}))
