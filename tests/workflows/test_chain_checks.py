"""What the recipe alone shows to be wrong is reported before the first stage, and before Ray starts;
what the corpus shows, before the first training.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from smalti.config import load_recipe, recipes_folder
from smalti.errors import ConfigError, DataError
from smalti.workflows import chain
from smalti.workflows.chain import run_recipe
from smalti.workflows.corpus import scan
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.smoke import shrink

WRONG = {
    "no source": (["corpus.source=null"], "corpus.source is not set"),
    "no encoder": (["encoder.train=null"], "No encoder is set"),
    "more cells than codes": (
        ["codebook.size=512", "codebook.coarse=600"],
        r"codebook\.coarse=600 cells for codebook\.size=512",
    ),
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


def test_a_stage_that_the_system_has_not_is_told_with_its_chain() -> None:
    recipe = load_recipe("dualtoken-384")
    with pytest.raises(
        ConfigError,
        match="has no stage codebook: its chain is corpus → encoder → tokenizer → tokens",
    ):
        run_recipe(recipe, only="codebook")


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in recipes_folder().glob("*-quickstart.yaml"))
)
def test_a_quickstart_passes_its_checks_and_shrinks(name: str, tmp_path: Path) -> None:
    """Its stages run in the smoke of the larger recipe of its system, which has the same phases."""
    recipe = load_recipe(name, [f"out={tmp_path}/out"])
    chain._check(recipe, None)
    small = shrink(recipe)
    chain._check(small, None)
    assert chain.stages_of(small) == chain.stages_of(recipe)


def test_a_bridge_without_its_section_is_refused_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chain, "ensure_ray", lambda recipe: pytest.fail("Ray was started"))
    with pytest.raises(
        ConfigError, match=r"bridge\.decoder is not set: name a text-to-image pipeline"
    ):
        run_recipe(load_recipe("unicode2-500k"), only="bridge")


def test_a_corpus_that_holds_nothing_out_ends_the_chain_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "ensure_ray", lambda recipe: nullcontext())
    monkeypatch.setattr(corpus, "ensure_ray", lambda recipe: nullcontext())
    monkeypatch.setattr(
        scan,
        "run_shards",
        lambda items, worker, args, resources, **more: map(worker(*args).work, items),
    )
    own = [
        "corpus.source=generated:4",
        "corpus.format=auto",
        "corpus.val_source=null",
        "corpus.val_fraction=0",
    ]
    recipe = load_recipe("semhitok-quickstart", [f"out={tmp_path}/out", "tracking.uri=off", *own])
    with pytest.raises(DataError, match=rf"holds out no image.*remove {tmp_path}/out/corpus"):
        run_recipe(recipe)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["corpus"]
