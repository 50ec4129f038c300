"""What the tokenizer stage refuses before any stage has run.

Covers: workflows/systems/base.py, workflows/systems/dualtoken.py, workflows/systems/phases.py,
workflows/systems/registry.py, workflows/systems/semhitok.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.config import load_recipe
from smalti.errors import ArtifactError, ConfigError
from smalti.schema import Loss, MllmSection, Perceptual, Recipe
from smalti.workflows import mllm
from smalti.workflows.chain import run_recipe
from smalti.workflows.systems.phases import placed
from smalti.workflows.tokenizer import check

CHAIN = ["mllm.config={}", "encoder.train={}", "corpus.source=generated:4", "tracking.uri=off"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, [*CHAIN, *overrides])


DUAL = ["system=dualtoken", "encoder.layer=-2", "tokenizer.dual.pixel_layers=[2, 1]"]
WRONG = {
    "no weights": (
        ["tokenizer.pixel.loss.perceptual.kind=lpips"],
        "tokenizer.pixel.loss.perceptual.weights",
    ),
    "small for the GAN": (
        ["corpus.image_size=16", "tokenizer.pixel.loss.gan.weight=0.5"],
        "tokenizer.pixel.loss.gan.layers=3 needs images of at least 24 px",
    ),
    "adaptive under ZeRO-3": (
        ["tokenizer.decoder={train: {zero_stage: 3}, loss: {gan: {weight: 0.5, adaptive: true}}}"],
        "tokenizer.decoder.loss.gan.adaptive",
    ),
    "batch of a phase": (
        ["tokenizer.semantic.train.batch_size=5", "resources.workers=2"],
        "tokenizer.semantic: ",
    ),
    "batch of the model": (
        ["mllm.train.batch_size=5", "resources.workers=2"],
        "mllm: train.batch_size=5",
    ),
    "a contrastive loss of another batch on other workers": (
        ["encoder.train={train: {batch_size: 8, micro_batch_size: 2}}", "resources.workers=[1, 2]"],
        "2 with 1 workers, 4 with 2 workers, so the curve would jump. Remove train.micro_batch_size",
    ),
    "an adaptive weight of another batch on other workers": (
        [
            "tokenizer.pixel={train: {batch_size: 8, micro_batch_size: 2}, loss: {gan: {weight: 0.5, adaptive: true}}}",
            "resources.workers=[1, 2]",
        ],
        "tokenizer.pixel: the adaptive weight of loss.gan sees",
    ),
    "keys of another system": (
        ["tokenizer.dual.depth=4"],
        "sets tokenizer.dual, which system: semhitok does not read",
    ),
    "heads of another system": (["mllm.depth_heads.layers=2"], "mllm.depth_heads"),
    "clustering where there is none": (
        [*DUAL, "codebook.size=512"],
        "sets codebook, which system: dualtoken does not read; of the tokenizer it reads tokenizer.dual",
    ),
    "a second codebook for places": ([*DUAL, "mllm.adapter=cascade"], "Set mllm.adapter=single"),
    "stages of SemHiTok": ([*DUAL, "tokenizer.pixel.codes=4"], "sets tokenizer.pixel"),
    "features after the last norm": ([*DUAL, "encoder.layer=-1"], "Set encoder.layer=-2"),
    "layers that the encoder does not have": (
        [*DUAL, "tokenizer.dual.pixel_layers=[6, 4]"],
        "expected distinct blocks from 1 to 3",
    ),
    "batch of the phase dual": (
        [*DUAL, "tokenizer.dual.train.batch_size=5", "resources.workers=2"],
        "tokenizer.dual: ",
    ),
    "images too small for its GAN": (
        [*DUAL, "corpus.image_size=16", "tokenizer.dual.loss.gan.weight=0.5"],
        "tokenizer.dual.loss.gan.layers=3 needs images of at least 24 px",
    ),
    "of a baseline": (
        ["baselines={flat: {tokenizer.pixel.train.batch_size: 7}}", "resources.workers=2"],
        "tokenizer.pixel: train.batch_size=7",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_recipe_that_would_fail_after_hours_fails_before_the_first_stage(
    tmp_path: Path, kind: str
) -> None:
    overrides, named = WRONG[kind]
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        run_recipe(recipe(*overrides, f"out={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_losses_that_sum_over_micro_batches_go_with_any_number_of_workers() -> None:
    elastic = ["corpus.image_size=64", "resources.workers=[1, 2]"]
    cut = "train: {batch_size: 8, micro_batch_size: 2}"
    check(recipe(f"tokenizer.pixel={{{cut}, loss: {{gan: {{weight: 0.5}}}}}}", *elastic))
    whole = "tokenizer.pixel={train: {batch_size: 8}, loss: {gan: {weight: 0.5, adaptive: true}}}"
    check(recipe(whole, *elastic))


def test_weights_that_are_not_there_are_told_with_their_key(tmp_path: Path) -> None:
    weights = tmp_path / "lpips.safetensors"
    given = recipe(f"tokenizer.pixel.loss.perceptual={{kind: lpips, weights: {weights}}}")
    with pytest.raises(
        ArtifactError, match=r"tokenizer\.pixel\.loss\.perceptual\.weights=.* does not exist"
    ):
        check(given)
    weights.touch()
    check(given)
    with pytest.raises(ConfigError, match=r"at least 16 px, but corpus\.image_size=8"):
        check(
            recipe(
                f"tokenizer.pixel.loss.perceptual={{kind: lpips, weights: {weights}}}",
                "corpus.image_size=8",
            )
        )


def test_what_is_not_used_is_not_asked_for() -> None:
    check(
        recipe(
            "tokenizer.guidance=false",
            "tokenizer.semantic.train.batch_size=5",
            "resources.workers=2",
        )
    )
    check(recipe("tokenizer.pixel.loss.perceptual={kind: lpips, weight: 0.0}"))


def test_local_files_of_a_recipe_are_found_by_workers_that_stand_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "lpips.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "here")
    loss = placed(Loss(perceptual=Perceptual(kind="lpips", weights="lpips.safetensors")))
    model = mllm.with_absolute_path(MllmSection(pretrained="model"))
    monkeypatch.chdir(tmp_path)
    assert loss.perceptual.weights and Path(loss.perceptual.weights).is_file()
    assert model.pretrained and Path(model.pretrained).is_dir()
    assert placed(Loss(perceptual=Perceptual(weights="s3://b/l"))).perceptual.weights == "s3://b/l"
    assert (
        mllm.with_absolute_path(MllmSection(pretrained="Qwen/Qwen2.5-7B-Instruct")).pretrained
        == "Qwen/Qwen2.5-7B-Instruct"
    )
