"""`smalti quickstart --images`: a folder of one's own in the place of easy-vqa, in sizes that fit
it.

Covers: workflows/mllm.py.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from smalti.artifact import Artifact
from smalti.config import find_recipe, load_recipe
from smalti.errors import ConfigError, DataError
from smalti.schema import Recipe
from smalti.workflows import mllm, quickstart, tokenizer
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.train.elastic import check_batch


@pytest.fixture
def chain(inline: None, monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipe that the whole chain would run with; its corpus is made, in this process."""
    ran: list[Recipe] = []

    def run_recipe(recipe: Recipe, *, only: str | None = None) -> list[Artifact]:
        if only == "corpus":
            return [corpus.run(recipe)]
        ran.append(recipe)
        return []

    monkeypatch.setattr(quickstart, "run_recipe", run_recipe)
    return ran


def pictures(folder: Path, num: int) -> str:
    for number in range(num):
        (folder / f"kind {number % 2}").mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.new("RGB", (16, 16), (number, 0, 99)).save(stream, "PNG")
        (folder / f"kind {number % 2}" / f"{number}.png").write_bytes(stream.getvalue())
    return str(folder)


OFF = "tracking.uri=off"


def test_sizes_fit_the_folder_and_what_was_asked_for_stays(
    chain: list[Recipe], tmp_path: Path
) -> None:
    images = pictures(tmp_path / "my pictures", 40)
    quickstart.run(
        str(tmp_path / "out"), images, [OFF, "corpus.val_fraction=0.3", "mllm.train.batch_size=4"]
    )
    (recipe,) = chain
    num_train = Artifact.load(str(tmp_path / "out" / "corpus")).counts["train"]
    assert (recipe.corpus.source, recipe.corpus.val_source, recipe.corpus.val_fraction) == (
        images,
        None,
        0.3,
    )
    assert recipe.mllm.train.batch_size == 4
    assert recipe.tokenizer.semantic.train.batch_size == num_train // 2 * 2
    assert recipe.codebook.size * quickstart.VECTORS_A_CODE <= num_train * 16
    assert recipe.baselines == {} and recipe.evaluate.goals == {}


def test_what_cannot_be_is_told_and_can_be_mended(chain: list[Recipe], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no such folder"):
        quickstart.run(out, str(tmp_path / "gone"), [OFF])
    with pytest.raises(ConfigError, match="keep one"):
        quickstart.run(out, str(tmp_path), [OFF, "corpus.source=x"])
    (tmp_path / "words.md").write_text("no image")
    with pytest.raises(DataError, match="neither a folder nor"):
        quickstart.run(out, str(tmp_path / "words.md"), [OFF])
    with pytest.raises(
        DataError, match=rf"gave \d+ training .* needs at least 16 .* remove {out}/corpus"
    ):
        quickstart.run(out, pictures(tmp_path / "few", 12), [OFF, "corpus.val_fraction=0.3"])
    assert not chain


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_images_gives_batches_that_the_workers_can_share(workers: int) -> None:
    recipe = load_recipe(find_recipe(quickstart.RECIPE), [f"resources.workers={workers}"])
    if workers == 3:  # whatever the recipe's own sizes are
        sections = ("encoder.train", "tokenizer.semantic", "tokenizer.pixel", "mllm")
        recipe = load_recipe(
            None,
            [f"{section}.train.batch_size=48" for section in sections],
            base=recipe.model_dump(),
        )
    for num_images in (quickstart.MIN_IMAGES, 17, 25, 31, 33, 63, 65, 1000):
        fits = quickstart.fitted(recipe, num_images)
        tokenizer.check(fits)
        mllm.check(fits)
        assert fits.encoder.train
        check_batch("encoder.train", fits.encoder.train.train, fits.resources)
        assert fits.tokenizer.semantic.train.batch_size <= num_images
    assert fits.tokenizer.semantic.train.batch_size == recipe.tokenizer.semantic.train.batch_size
