"""Texts, checks and fingerprint of the language model's stage."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalti import shards
from smalti.errors import ConfigError, DataError
from smalti.schema import (
    LanguageModel,
    Lora,
    Mixture,
    MllmSection,
    MllmStage,
    Recipe,
    Train,
)
from smalti.workflows.mllm import check, check_parts, prepare_texts, read_texts, result_config
from smalti.workflows.train.data import shard_index


def write(place: Path, sizes: list[int]) -> tuple[list[str], list[int]]:
    for index, size in enumerate(sizes):
        table = pa.table(
            {"n": [100 * index + row for row in range(size)], "pad": [bytes(1000)] * size}
        )
        shards.write_shard(str(place), shards.shard_key("train", index), table)
    return shard_index(str(place), "train")


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_texts_are_read_from_every_format(tmp_path, ending) -> None:
    texts = ["one line", "", "Größe ×2"]
    file = tmp_path / f"texts.{ending}"
    if ending == "txt":
        file.write_text("\n".join(texts))
    elif ending == "jsonl":
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        pq.write_table(pa.table({"text": texts}), file)
    assert list(read_texts(str(file))) == ["one line", "Größe ×2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "expected a .txt"),
        ("a.jsonl", '{"text": "x"}\nnope', "line 2 is not JSON"),
        ("a.jsonl", '{"txt": "x"}', 'no string field "text"'),
    ],
)
def test_texts_that_cannot_be_read_say_where(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_texts(str(tmp_path / name)))


def test_a_run_that_goes_on_keeps_the_texts_that_it_began_with(tmp_path) -> None:
    """Also the tokenizer that was made of them, whose ids the checkpoint's rows stand for."""
    source, tokens, here = tmp_path / "texts.txt", str(tmp_path / "tokens"), tmp_path / "stage"
    source.write_text("one line\nanother")
    write(Path(tokens), [1])
    columns = {"caption": ["a red ball"], "label": [None], "qa": [[]]}
    table = pa.table(
        {"image_id": ["a"], "codes": shards.list_column(np.zeros((1, 4), np.int32)), **columns}
    )
    shards.write_shard(tokens, "train/00000", table.cast(shards.token_schema((4,))))
    section = MllmSection(
        config=LanguageModel(text_vocab_size=280), mixture=Mixture(text=1), text_source=str(source)
    )
    run = SimpleNamespace(path=str(here), recipe=Recipe(mllm=section))
    assert prepare_texts(run, tokens) == (["train/00000"], [2])
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    source.write_text("quite another text\n" * 7)
    assert prepare_texts(run, tokens) == (["train/00000"], [2])
    assert {file: file.read_bytes() for file in here.rglob("*") if file.is_file()} == before


def test_parts_that_leave_nothing_to_train_are_refused() -> None:
    train = Train(steps=10)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        check_parts(MllmSection(freeze=["new_rows", "adapter", "backbone"]))
    with pytest.raises(ConfigError, match=r"which mllm\.freeze names"):
        check_parts(MllmSection(lora=Lora(), freeze=["backbone"]))
    frozen = MllmStage(from_step=4, freeze=["new_rows", "adapter"])
    with pytest.raises(ConfigError, match="From step 4 on"):
        check_parts(MllmSection(freeze=["backbone"], stages=[frozen], train=train))
    check_parts(
        MllmSection(lora=Lora(), freeze=["new_rows"], stages=[MllmStage(from_step=1)], train=train)
    )


def test_settings_that_change_no_result_are_not_in_the_fingerprint() -> None:
    plain = MllmSection()
    assert result_config(plain) == result_config(plain.model_copy(update={"packing": True}))
    spared = Train(
        zero_stage=3, offload="cpu", activation_checkpointing=True, compile=True, micro_batch_size=4
    )
    assert result_config(plain) == result_config(plain.model_copy(update={"train": spared}))
    assert {"lr", "freeze", "lora", "packing"}.isdisjoint(result_config(plain))
    assert result_config(MllmSection(freeze=["adapter"]))["freeze"] == ["adapter"]


def test_a_mixture_that_cannot_be_trained_is_refused_at_once() -> None:
    from smalti.schema import LanguageModel, MllmSection, Recipe

    def recipe(**settings) -> Recipe:
        return Recipe(mllm=MllmSection(**settings))

    with pytest.raises(ConfigError, match=r"neither mllm.pretrained nor mllm.config"):
        check(recipe())
    with pytest.raises(ConfigError, match=r"mllm.text_source is not set"):
        check(recipe(config=LanguageModel(), mixture=Mixture(text=1.0)))
    with pytest.raises(ConfigError, match="no kind with images"):
        check(
            recipe(
                config=LanguageModel(),
                mixture=Mixture(caption_to_image=0, image_to_caption=0, qa=0, text=1),
            )
        )
    check(recipe(config=LanguageModel()))
