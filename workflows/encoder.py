"""Stage `encoder`: the frozen text-aligned encoder.

It is named (`encoder.pretrained`) or trained here (`encoder.train`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TypedDict

import pyarrow as pa

from smalti import shards, storage
from smalti.artifact import Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import EncoderTrain, Recipe, result_settings
from smalti.tokenizers.encoders import open_encoder
from smalti.tracking import Tracker
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.pipeline.pixels import load_pixels
from smalti.workflows.pipeline.stage import Body, StageRun, find_artifact, run_stage
from smalti.workflows.train.elastic import check_batch

MODEL = "model"
TEXT_TOKENIZER = "text_tokenizer"
ZERO_SHOT_IMAGES = 5_000
ZERO_SHOT_BATCH = 64


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The encoder artifact.

    With `pretrained`, a record of the resolved path or name, no copy. With `train`, an ordinary
    Hugging Face SiglipModel directory `model/`; its scores hold `zero_shot/accuracy` on held-out
    images.

    Raises:
        ConfigError: if neither is set.
        ArtifactError: if the pretrained encoder cannot be loaded.
    """
    check(recipe)
    section = recipe.encoder
    if section.pretrained:
        name = resolve(section.pretrained)
        return run_stage(
            recipe, "encoder", "encoder", {"pretrained": name}, {}, _record(name), tracker=tracker
        )
    assert section.train is not None
    corpus = find_artifact(recipe, "corpus")
    config = {
        "train": result_settings(section.train),
        "image_size": recipe.corpus.image_size,
        "seed": recipe.seed,
    }
    body = _train(section.train, corpus)
    return run_stage(
        recipe, "encoder", "encoder", config, {"corpus": corpus}, body, tracker=tracker
    )


def check(recipe: Recipe) -> None:
    """Raise ConfigError if no encoder is named and none is to be trained."""
    if not recipe.encoder.pretrained and recipe.encoder.train is None:
        raise ConfigError(
            "No encoder is set. Set encoder.pretrained to a SigLIP directory or hub name "
            "(google/siglip-base-patch16-256), or encoder.train to train one on the corpus."
        )
    if recipe.encoder.train is not None and not recipe.encoder.pretrained:
        check_batch(
            "encoder.train",
            recipe.encoder.train.train,
            recipe.resources,
            together="the contrastive loss",
        )


def encoder_path(artifact: Artifact) -> str:
    """What transformers loads: the pretrained path or hub name, or the folder trained here."""
    return artifact.config.get("pretrained") or storage.join(artifact.path, MODEL)


def resolve(pretrained: str) -> str:
    """A local directory as an absolute path; a URL or hub name unchanged."""
    return os.path.abspath(pretrained) if os.path.isdir(pretrained) else pretrained


def _record(name: str) -> Body:
    def body(run: StageRun) -> dict[str, int]:
        encoder = open_encoder(name, run.recipe.encoder.layer)
        rows, columns = encoder.grid
        run.log(
            f"{name}: {encoder.image_size} px, {rows}x{columns} patches of {encoder.dim} features"
        )
        return {"image_size": encoder.image_size, "patches": rows * columns, "dim": encoder.dim}

    return body


def _train(section: EncoderTrain, corpus: Artifact) -> Body:
    def body(run: StageRun) -> dict[str, int]:
        from smalti.workflows.train.launch import fit
        from smalti.workflows.train.tasks.encoder import EncoderTask

        recipe = run.recipe
        keys, sizes, texts = captioned(corpus)
        make_text_tokenizer(run, section, texts)
        settings = {
            "corpus": corpus.path,
            "keys": keys,
            "sizes": sizes,
            "encoder": section,
            "image_size": recipe.corpus.image_size,
            "max_pixels": recipe.corpus.max_pixels,
            "path": run.path,
        }
        with ensure_ray(recipe):
            fit(EncoderTask, settings, section.train, run, seed=recipe.seed)
        scored = zero_shot(corpus, storage.join(run.path, MODEL), texts, recipe)
        if scored is not None:
            run.scores["zero_shot/accuracy"] = scored["value"]
            run.scores |= {"zero_shot/n": scored["n"], "zero_shot/classes": scored["classes"]}
            run.log(
                f"zero-shot accuracy {scored['value']:.3f} on {scored['n']:,} held-out images, "
                f"{scored['classes']} classes"
            )
        return {"pairs": sum(sizes), "steps": section.train.steps}

    return body


def captioned(corpus: Artifact) -> tuple[list[str], list[int], Counter[tuple[str, str]]]:
    """Training shards, their rows with a text, and counts of (text, label) pairs.

    Raises:
        DataError: if no image has a text.
    """
    from smalti.workflows.train.tasks.encoder import text_of

    keys = []
    sizes = []
    texts = Counter[tuple[str, str]]()
    for key, table in _tables(corpus, "train", ["caption", "label"]):
        pairs = list(
            zip(table.column("caption").to_pylist(), table.column("label").to_pylist(), strict=True)
        )
        used = [
            (text_of(caption, label), label or "")
            for caption, label in pairs
            if text_of(caption, label)
        ]
        keys.append(key)
        sizes.append(len(used))
        texts.update(used)
    if not texts:
        raise DataError(
            f"No training image of {corpus.path} has a caption or a label, and encoder.train "
            "learns from image-text pairs. Give the images captions (a .txt beside each, "
            "metadata.jsonl) or folders as labels and remove that corpus, or set "
            "encoder.pretrained."
        )
    return keys, sizes, texts


def make_text_tokenizer(
    run: StageRun, section: EncoderTrain, texts: Counter[tuple[str, str]]
) -> None:
    """Train the BPE of the captions into `<stage>/text_tokenizer`; the same every time."""
    from smalti.mllm.bpe import train_bpe

    words = (text for (text, _), count in sorted(texts.items()) for _ in range(count))
    with storage.atomic_local_dir(storage.join(run.path, TEXT_TOKENIZER)) as folder:
        train_bpe(words, section.text_vocab_size).save_pretrained(folder)


class ZeroShotAccuracy(TypedDict):
    """Accuracy in [0, 1], its sample size, and the number of classes."""

    value: float
    n: int
    classes: int


def zero_shot(
    corpus: Artifact, model: str, texts: Counter[tuple[str, str]], recipe: Recipe
) -> ZeroShotAccuracy | None:
    """Zero-shot accuracy on held-out images.

    A label is represented by the embedding of its most frequent training text. None if fewer than two
    labels with a known text are held out.
    """
    import torch

    from smalti.tokenizers.encoders import VisionEncoder, batches

    prompts = prompts_of(texts)
    labels = sorted(prompts)
    if len(labels) < 2:
        return None
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
    torch.set_num_threads(cores)
    with storage.local_copy(model) as folder:
        encoder = VisionEncoder.from_pretrained(folder)
        right = seen = 0
        for key, table in _tables(corpus, "val", ["label"]):
            wanted = table.column("label").to_pylist()
            if seen >= ZERO_SHOT_IMAGES or not any(label in prompts for label in wanted):
                continue
            _, pixels = load_pixels(
                corpus.path, key, recipe.corpus.image_size, recipe.corpus.max_pixels, ["image_id"]
            )
            found: list[int] = []
            for part in batches(pixels, ZERO_SHOT_BATCH, "cpu"):
                found += (
                    encoder.logits(part, [prompts[label] for label in labels]).argmax(-1).tolist()
                )
            hits = [
                labels[i] == label
                for i, label in zip(found, wanted, strict=True)
                if label in prompts
            ]
            right += sum(hits)
            seen += len(hits)
    return {"value": right / seen, "n": seen, "classes": len(labels)} if seen else None


def prompts_of(texts: Counter[tuple[str, str]]) -> dict[str, str]:
    """The most frequent training text of each label; ties take the first in order."""
    best: dict[str, tuple[int, str]] = {}
    for (text, label), count in sorted(texts.items()):
        if label and count > best.get(label, (0, ""))[0]:
            best[label] = (count, text)
    return {label: text for label, (_, text) in best.items()}


def _tables(corpus: Artifact, split: str, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    for key in shards.list_shards(corpus.path, split):
        yield key, shards.read_shard(corpus.path, key, columns)
