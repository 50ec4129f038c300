"""Stage `mllm`: token shards (and text) → the unified language model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from smalti import shards, storage
from smalti.artifact import Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import MODEL_PARTS, MllmSection, Recipe, result_settings
from smalti.tracking import Tracker
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.encoder import resolve
from smalti.workflows.pipeline.stage import StageRun, find_artifact, run_stage
from smalti.workflows.train.elastic import check_batch

TEXT_ROWS = 10_000  # per shard of text
PREPARED = "prepared.json"


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """Train the unified language model of a recipe.

    Returns:
        The artifact: `model/` (see `smalti.mllm.build`), `text_tokenizer/`, and `text/` shards of
        text-only data. Counts: rows (images to train on), texts, steps.

    Raises:
        ConfigError: if sections of the recipe do not fit together.
        DataError: if no row of the token shards is usable.
    """
    check(recipe)
    parents = {name: find_artifact(recipe, name) for name in ("tokenizer", "tokens")}
    config = result_config(recipe.mllm) | {"seed": recipe.seed}
    return run_stage(
        recipe,
        "mllm",
        "mllm",
        config,
        parents,
        lambda stage: _body(stage, parents),
        tracker=tracker,
    )


def result_config(section: MllmSection) -> dict[str, Any]:
    """The settings that the model depends on; a local `pretrained` as an absolute path."""
    config = result_settings(section)
    if config["pretrained"]:
        config["pretrained"] = resolve(config["pretrained"])
    return config


def check(recipe: Recipe) -> None:
    """Check the mllm section before the chain starts.

    Raises:
        ConfigError: if there is no model or two, no kind of sequence with images, text without a
            source, nothing to train, or if batches cannot be split over the workers.
    """
    section = recipe.mllm
    if bool(section.pretrained) == bool(section.config):
        found = "neither mllm.pretrained nor mllm.config"
        if section.pretrained:
            found = "both mllm.pretrained and mllm.config"
        raise ConfigError(
            f"The recipe sets {found}; set one: a folder or hub name, or the numbers of a small "
            "Qwen2."
        )
    for mixture in [section.mixture, *(stage.mixture for stage in section.stages if stage.mixture)]:
        if not any((mixture.caption_to_image, mixture.image_to_caption, mixture.qa)):
            raise ConfigError(
                "mllm.mixture has no kind with images. Set caption_to_image, image_to_caption or "
                "qa above 0."
            )
    if section.whole_mixture.text and not section.text_source:
        raise ConfigError(
            "mllm.mixture.text is above 0, but mllm.text_source is not set. Set it, or set text to "
            "0."
        )
    check_parts(section)
    check_batch("mllm", section.train, recipe.resources)


def check_parts(section: MllmSection) -> None:
    """Check `mllm.freeze`, `mllm.stages` and `mllm.lora`.

    Raises:
        ConfigError: if nothing is left to train, or nothing of LoRA; if peft is missing.
    """
    if section.lora:
        from smalti.mllm.lora import require_peft

        require_peft()
    if set(section.freeze) == set(MODEL_PARTS):
        raise ConfigError(f"mllm.freeze={section.freeze} leaves nothing to train. Remove a part.")
    if section.lora and "backbone" in section.freeze:
        raise ConfigError(
            "mllm.lora puts trained updates into the backbone, which mllm.freeze names. Set one of "
            "the two: with LoRA the backbone's own weights are not trained anyway."
        )
    for start in [0, *(stage.from_step for stage in section.stages)]:
        if not any(section.rates_at(start).values()):
            raise ConfigError(
                f"From step {start} on, mllm.freeze and mllm.stages leave nothing to train. "
                "Unfreeze a part."
            )


def _body(run: StageRun, parents: dict[str, Artifact]) -> dict[str, int]:
    from smalti.workflows.train.launch import fit
    from smalti.workflows.train.tasks.mllm import MllmTask

    section = run.recipe.mllm
    tokens = parents["tokens"].path
    text = prepare_texts(run, tokens)
    keys, sizes = usable(run, tokens)
    settings = {
        "section": with_absolute_path(section),
        "tokenizer": parents["tokenizer"].path,
        "tokens": tokens,
        "keys": keys,
        "sizes": sizes,
        "path": run.path,
        "text": text,
    }
    with ensure_ray(run.recipe):
        fit(MllmTask, settings, section.train, run, seed=run.recipe.seed)
    return {
        "rows": sum(sizes),
        "texts": sum(text[1]) if text else 0,
        "steps": section.train.steps,
    }


def usable(run: StageRun, tokens: str) -> tuple[list[str], list[int]]:
    """Training shards of tokens, and the number of usable rows in each.

    Raises:
        DataError: if there is no usable row.
    """
    from smalti.workflows.train.data import shard_index
    from smalti.workflows.train.tasks.mllm import usable_rows

    mixture = run.recipe.mllm.whole_mixture
    if mixture.caption_to_image:
        return shard_index(tokens, "train")
    keys = shards.list_shards(tokens, "train")
    sizes = [
        len(usable_rows(shards.read_shard(tokens, key, ["caption", "label", "qa"]), mixture))
        for key in keys
    ]
    if not sum(sizes):
        raise DataError(
            f"No row of {tokens} has what mllm.mixture needs (a caption, or a question with its "
            "answer). Set mllm.mixture.caption_to_image above 0, which needs neither, or add "
            "captions or questions to the corpus."
        )
    return keys, sizes


def with_absolute_path(section: MllmSection) -> MllmSection:
    """The section for workers: a local model by its absolute path.

    Workers run in other folders.
    """
    if not section.pretrained:
        return section
    return section.model_copy(update={"pretrained": resolve(section.pretrained)})


def prepare_texts(run: StageRun, tokens: str) -> tuple[list[str], list[int]] | None:
    """Write text shards and the text tokenizer, once.

    A resumed run uses those of its first start, even if `mllm.text_source` has changed since.

    Returns:
        Keys and numbers of rows of the text shards; None without text-only data.
    """
    record = storage.join(run.path, PREPARED)
    if not storage.exists(record):
        text = write_texts(run) if run.recipe.mllm.whole_mixture.text else None
        make_text_tokenizer(run, tokens)
        storage.write_json(record, {"text": text})
    found = storage.read_json(record)["text"]
    return None if found is None else (found[0], found[1])


def make_text_tokenizer(run: StageRun, tokens: str) -> None:
    """Write `<stage>/text_tokenizer`.

    It is the pretrained model's, or a BPE trained on all texts of the training data.
    """
    from smalti.mllm.base_lm import load_text_tokenizer
    from smalti.mllm.bpe import train_bpe

    section = run.recipe.mllm
    with storage.atomic_local_dir(storage.join(run.path, "text_tokenizer")) as folder:
        if section.pretrained:
            load_text_tokenizer(section.pretrained).save_pretrained(folder)
        else:
            assert section.config is not None
            train_bpe(_texts(run, tokens), section.config.text_vocab_size).save_pretrained(folder)


def _texts(run: StageRun, tokens: str) -> Iterator[str]:
    """All texts of the training data.

    Captions (else labels), questions, answers, text-only data.
    """
    from smalti.mllm.sequences import caption_of, questions_of

    for key in shards.list_shards(tokens, "train"):
        for row in shards.read_shard(tokens, key, ["caption", "label", "qa"]).to_pylist():
            yield caption_of(row)
            for question, answer in questions_of(row):
                yield question
                yield answer
    if run.recipe.mllm.whole_mixture.text:
        folder = storage.join(run.path, "text")
        for key in shards.list_shards(folder, "train"):
            yield from shards.read_shard(folder, key).column("text").to_pylist()


def write_texts(run: StageRun) -> tuple[list[str], list[int]]:
    """Write `mllm.text_source` as shards of a column `text` under `<stage>/text`.

    Returns:
        Keys and numbers of rows of the shards.

    Raises:
        DataError: if there is no text.
    """
    source = run.recipe.mllm.text_source
    assert source is not None
    folder = storage.join(run.path, "text")
    keys: list[str] = []
    sizes: list[int] = []
    held: list[str] = []

    def flush() -> None:
        keys.append(shards.shard_key("train", len(keys)))
        sizes.append(len(held))
        shards.write_shard(folder, keys[-1], pa.table({"text": pa.array(held, pa.string())}))
        held.clear()

    for text in read_texts(source):
        held.append(text)
        if len(held) == TEXT_ROWS:
            flush()
    if held:
        flush()
    if not keys:
        raise DataError(
            f"mllm.text_source={source} holds no text. Give it text, or set mllm.mixture.text=0."
        )
    return keys, sizes


def read_texts(source: str) -> Iterator[str]:
    """Texts of a file, without empty ones.

    Args:
        source: a .txt file (one text per line), or a .jsonl or .parquet file with a `text` field.

    Raises:
        DataError: if the file is of another type or lacks the field, or if a line is not JSON.
    """
    ending = source.rsplit(".", 1)[-1].lower()
    if ending not in ("txt", "jsonl", "parquet"):
        raise DataError(f"mllm.text_source={source}: expected a .txt, .jsonl or .parquet file")
    with storage.open_read(source) as file:
        if ending == "parquet":
            yield from _parquet_texts(file, source)
            return
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8", errors="replace").strip()
            if ending == "jsonl" and text:
                text = _json_text(text, f"{source}, line {number}").strip()
            if text:
                yield text


def _parquet_texts(file: IO[bytes], source: str) -> Iterator[str]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    if "text" not in names:
        raise DataError(f"{source} has no column `text`; it has {', '.join(names)}")
    for batch in parquet.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            if text and text.strip():
                yield text


def _json_text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise DataError(f'{where} has no string field "text"')
    return value["text"]
