"""What the recipe alone shows to be wrong is told before the first stage, and before Ray starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.config import load_recipe
from smalti.errors import ConfigError
from smalti.workflows.chain import run_recipe

WRONG = {
    "no source": (["corpus.source=null"], "corpus.source is not set"),
    "no encoder": (["encoder.train=null"], "No encoder is set"),
    "more cells than codes": (["codebook.coarse=600"], r"codebook\.coarse=600 cells for codebook\.size=512"),
    "no model": (["mllm.config=null"], "neither mllm.pretrained nor mllm.config"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_recipe_that_cannot_work_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    overrides, told = WRONG[kind]
    recipe = load_recipe("semhitok-quickstart", [f"out={tmp_path}/out", *overrides])
    with pytest.raises(ConfigError, match=told):
        run_recipe(recipe)
    assert not (tmp_path / "out").exists()


def test_a_stage_alone_needs_its_own_keys_only(tmp_path: Path) -> None:
    recipe = load_recipe("semhitok-quickstart", [f"out={tmp_path}/out", "corpus.source=null"])
    with pytest.raises(ConfigError, match=r"corpus\.source is not set"):
        run_recipe(recipe, only="corpus")
