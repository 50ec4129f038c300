"""UniCode²'s stages: the tokenizer put together from its parents, and recipes that do not fit the
system.

Covers: tokenizers/tensor_files.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from smalti import storage
from smalti.artifact import Artifact
from smalti.cli import main
from smalti.config import dump, load_recipe, with_overrides
from smalti.errors import ConfigError, DataError
from smalti.schema import EncoderTrain, Recipe
from smalti.tokenizers import tensor_files
from smalti.tokenizers.codebook import CENTROIDS, TREE
from smalti.tokenizers.loading import load_tokenizer
from smalti.tokenizers.siglip import build_siglip
from smalti.workflows import tokenizer
from smalti.workflows.chain import run_recipe, stages_of
from smalti.workflows.pipeline.stage import run_stage

CHAIN = [
    "system=unicode2",
    "mllm.config={}",
    "encoder.train={}",
    "corpus.source=generated:4",
    "tracking.uri=off",
]
WIDTH = 16


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A tiny SigLIP and the recipe that names it."""
    size = EncoderTrain(
        patch_size=8, hidden_size=WIDTH, layers=1, heads=2, text_layers=1, text_length=6
    )
    build_siglip(size, 32, 40, 0, 1).save_pretrained(tmp_path / "siglip")
    own = ["encoder.train=null", f"encoder.pretrained={tmp_path}/siglip", "corpus.image_size=32"]
    return load_recipe(None, [*CHAIN, *own, f"out={tmp_path}/out"])


def parents(recipe: Recipe, codes_KC: torch.Tensor) -> None:
    """The artifacts that the stage reads, with these codes in two cells."""

    def encoder(run: Any) -> dict[str, int]:
        return {}

    def codes(run: Any) -> dict[str, int]:
        cell_of = torch.arange(len(codes_KC)) * 2 // len(codes_KC)
        cells = torch.stack([codes_KC[cell_of == cell].nanmean(0) for cell in range(2)])
        search = {"searched_cells": torch.tensor(2), "reach": torch.tensor(1.0).double()}
        search |= {"recall": torch.tensor(1.0).double()}
        tensor_files.write(
            storage.join(run.path, TREE), {"cells": cells, "cell_of": cell_of, **search}
        )
        tensor_files.write(storage.join(run.path, CENTROIDS), {"centroids": codes_KC})
        return {"codes": len(codes_KC)}

    run_stage(recipe, "encoder", "encoder", {"pretrained": recipe.encoder.pretrained}, {}, encoder)
    run_stage(recipe, "codebook", "codebook", {}, {}, codes)


def test_the_tokenizer_is_the_encoder_with_the_codebook(recipe: Recipe) -> None:
    codes_KC = torch.randn(12, WIDTH)
    parents(recipe, codes_KC)
    made: Artifact = tokenizer.run(recipe)
    assert made.counts == {"num_codes": 12, "tokens": 16}
    loaded = load_tokenizer(made.path)
    assert torch.equal(loaded.code_vectors(), codes_KC) and loaded.probes.cells == 2
    assert loaded.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    assert stages_of(recipe)[2:5] == ["features", "codebook", "tokenizer"]


def test_reconstruct_says_that_there_is_no_decoder(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parents(recipe, torch.randn(12, WIDTH))
    made = tokenizer.run(recipe)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert (
        main(
            ["reconstruct", made.path, str(tmp_path / "a.png"), "--out", str(tmp_path / "pictures")]
        )
        == 2
    )
    assert (
        "UniCode² has no pixel decoder" in capsys.readouterr().err
        and not (tmp_path / "pictures").exists()
    )


def test_codes_that_are_not_finite_are_refused(recipe: Recipe) -> None:
    codes_KC = torch.randn(12, WIDTH)
    codes_KC[[3, 7], 2] = torch.tensor([torch.nan, torch.inf])
    parents(recipe, codes_KC)
    with pytest.raises(DataError, match=r"2 of 12 codes of .*codebook are NaN or Inf"):
        tokenizer.run(recipe)


def test_an_encoder_of_another_image_size_is_refused(recipe: Recipe) -> None:
    parents(recipe, torch.randn(12, WIDTH))
    with pytest.raises(ConfigError, match=r"Set corpus\.image_size=32"):
        tokenizer.run(with_overrides(recipe, {"corpus.image_size": 64}))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tokenizer.pixel.codes=4", r"sets tokenizer\.pixel, which system: unicode2 does not read"),
        ("tokenizer.guidance=false", r"sets tokenizer\.guidance"),
        ("mllm.adapter=dual", r"mllm\.adapter=dual .* Set mllm\.adapter=cascade"),
        ("codebook.coarse=20000", r"codebook\.coarse=20000 cells"),
    ],
)
def test_keys_that_do_not_fit_the_system_are_refused_before_the_first_stage(
    override: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        run_recipe(load_recipe(None, [*CHAIN, override, f"out={tmp_path}/out"]))
    assert not (tmp_path / "out").exists()


def test_the_adapter_is_a_cascade_where_the_recipe_names_none() -> None:
    recipe = load_recipe(None, CHAIN)
    assert recipe.mllm.adapter == "cascade" and Recipe.model_validate(dump(recipe)) == recipe
    assert load_recipe(None, [*CHAIN, "mllm.adapter=single"]).mllm.adapter == "single"
    assert Recipe(system="unicode2").mllm.adapter == "cascade" and Recipe().mllm.adapter == "dual"
