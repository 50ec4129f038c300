"""`smalti quickstart`: the whole chain, small, on this machine.

It runs on easy-vqa, or on a folder of one's own images.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from smalti.config import find_recipe, load_recipe, parse_override, with_overrides
from smalti.errors import ConfigError, DataError
from smalti.progress import log
from smalti.schema import Recipe
from smalti.storage import exists
from smalti.workflows.chain import run_recipe

RECIPE = "semhitok-quickstart.yaml"
MIN_IMAGES = 16
VECTORS_A_CODE = 16


def run(out: str, images: str | None = None, overrides: Sequence[str] = ()) -> None:
    """Train a tokenizer and a language model, score them, and write `<out>/report.html`.

    Args:
        images: a folder (captions in `.txt` files beside the pictures, or class folders) instead of
            easy-vqa.

    Raises:
        ConfigError: if the folder does not exist.
        DataError: if fewer than 16 of its images can be used.
    """
    recipe = load_recipe(find_recipe(RECIPE), [f"out={out}", *overrides])
    given = {parse_override(text)[0] for text in overrides}
    if images is not None and "corpus.source" in given:
        raise ConfigError("--images and corpus.source= both name the images; keep one")
    log(f"smalti quickstart: {'easy-vqa' if images is None else images} → {recipe.out}")
    log(
        "the chain: corpus → encoder → features → codebook → tokenizer → tokens → mllm → export → "
        "evaluation"
    )
    if images is not None:
        if not exists(images):
            raise ConfigError(
                f"--images {images}: there is no such folder. Name one that holds images."
            )
        own = {key: value for key, value in _corpus_of(images).items() if key not in given}
        recipe = _own_images(with_overrides(recipe, own))
    run_recipe(recipe)


def _corpus_of(images: str) -> dict[str, object]:
    """Overrides that replace easy-vqa by a folder.

    A tenth of the images is held out; there are no questions.
    """
    return {
        "name": "quickstart-own-images",
        "corpus.source": images,
        "corpus.format": "auto",
        "corpus.val_source": None,
        "corpus.val_fraction": 0.1,
        "corpus.shard_images": 250,
        "baselines": {},
        "evaluate.goals": {},  # those of the recipe are for easy-vqa
    }


def _own_images(recipe: Recipe) -> Recipe:
    """The recipe with sizes that fit the images of the folder."""
    corpus = run_recipe(recipe, only="corpus")[0]
    num_images = corpus.counts["train"]
    if num_images < MIN_IMAGES or not corpus.counts.get("val"):
        raise DataError(
            f"{recipe.corpus.source} gave {num_images} training and {corpus.counts.get('val', 0)} "
            f"held-out images; the quickstart needs at least {MIN_IMAGES} and 1. Add images and "
            f"remove {corpus.path}, whose quarantine lists what was left out."
        )
    return fitted(recipe, num_images)


def fitted(recipe: Recipe, num_images: int) -> Recipe:
    """The recipe with fewer codes and smaller batches for few images.

    Batches divide evenly among the workers.
    """
    size = recipe.codebook.size
    while size > 16 and size * VECTORS_A_CODE > num_images * _patches(recipe):
        size //= 2
    sections = (
        "encoder.train.train",
        "tokenizer.semantic.train",
        "tokenizer.pixel.train",
        "mllm.train",
    )
    workers = recipe.resources.max_workers
    most = max(workers, num_images // workers * workers)
    batches = {f"{section}.batch_size": min(_batch(recipe, section), most) for section in sections}
    return with_overrides(recipe, {"codebook.size": size, **batches})


def _patches(recipe: Recipe) -> int:
    """Patches of an image that the codebook is made from."""
    assert recipe.encoder.train is not None
    total = (recipe.corpus.image_size // recipe.encoder.train.patch_size) ** 2
    return total if recipe.features.patches == "all" else min(total, recipe.features.patches)


def _batch(recipe: Recipe, section: str) -> int:
    return int(attrgetter(f"{section}.batch_size")(recipe))
