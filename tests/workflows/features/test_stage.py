"""The encoder of the shard stages, wherever it lies.

Covers: workflows/cluster/devices.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from smalti import images, shards, storage
from smalti.errors import ArtifactError, ConfigError
from smalti.mllm.bpe import train_bpe
from smalti.schema import EncoderSection, EncoderTrain, Recipe, Resources
from smalti.tokenizers.encoders import VisionEncoder, open_encoder
from smalti.tokenizers.siglip import build_siglip
from smalti.workflows.cluster.devices import actor_device
from smalti.workflows.encoder import encoder_path
from smalti.workflows.encoder import run as run_encoder
from smalti.workflows.features.featurizer import FeatureShard, Featurizer
from smalti.workflows.sources.generated import draw


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    tokenizer = train_bpe(["a red square"], 259)
    size = EncoderTrain(
        patch_size=8, hidden_size=16, layers=1, heads=2, text_layers=1, text_length=6
    )
    build_siglip(
        size, 16, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def upload(folder: Path, url: str) -> str:
    for file in folder.iterdir():
        storage.write_atomic(storage.join(url, file.name), file.read_bytes())
    return url


def test_an_encoder_in_an_object_store_reads_images_and_texts(
    siglip: Path, memory_url: str
) -> None:
    pixels, local = torch.rand(2, 3, 16, 16), VisionEncoder.from_pretrained(str(siglip), 0)
    for place in (upload(siglip, f"{memory_url}/siglip"), f"file://{siglip}"):
        encoder = open_encoder(place, 0)
        assert torch.equal(encoder(pixels), local(pixels))
        assert torch.equal(
            encoder.logits(pixels, ["a red square"]), local.logits(pixels, ["a red square"])
        )


def test_a_recipe_may_name_an_encoder_by_url(siglip: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        out=str(tmp_path / "out"), encoder=EncoderSection(pretrained=f"file://{siglip}")
    )
    artifact = run_encoder(recipe)
    assert artifact.counts == {"image_size": 16, "patches": 4, "dim": 16}
    assert open_encoder(encoder_path(artifact), -1).grid == (2, 2)


def test_a_vision_tower_alone_in_an_object_store_reads_images(
    siglip: Path, memory_url: str, tmp_path: Path
) -> None:
    VisionEncoder.from_pretrained(str(siglip)).save_tower(tmp_path / "tower")
    encoder = open_encoder(upload(tmp_path / "tower", f"{memory_url}/tower"), -1)
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, 4, 16)
    with pytest.raises(ArtifactError):
        encoder.prompt_embeddings(["a"])


def corpus_shard(path: str, name: str, num: int) -> None:
    rows = [
        {
            "image_id": f"{name}{index}",
            "image": draw(0, name, index, 16)[0],
            "width": 16,
            "height": 16,
        }
        for index in range(num)
    ]
    shards.write_shard(path, "train/00000", pa.Table.from_pylist(rows, shards.CORPUS))


def test_a_restart_keeps_what_stands_and_makes_again_what_is_torn_or_of_other_images(
    siglip: Path, tmp_path: Path
) -> None:
    corpus, out, key = str(tmp_path / "corpus"), str(tmp_path / "out"), "train/00000"
    worker = FeatureShard(out, corpus, str(siglip), Recipe(), 16)
    file = tmp_path / "out" / "train" / "00000.parquet"
    corpus_shard(corpus, "old", 3)
    receipt, num_images = worker.work(worker.read(key))
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    assert (receipt.rows, num_images) == (3 * 4, 3)

    assert worker.work(worker.read(key)) == (receipt, 3)
    assert file.stat().st_mtime_ns == written, "what stands is not written again"

    file.write_bytes(whole[: len(whole) // 2])
    assert worker.work(worker.read(key)) == (receipt, 3)
    assert file.read_bytes() == whole, "made again, byte for byte"

    corpus_shard(corpus, "new", 2)
    assert worker.work(worker.read(key))[1] == 2
    assert shards.read_shard(out, key).column("image_id").unique().to_pylist() == ["new0", "new1"]


@pytest.mark.parametrize(
    ("setting", "close"),
    [
        ({"precision": "bf16"}, 0.05),
        pytest.param(
            {"compile": True},
            2e-3,
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="no compiler"),
        ),
    ],
)
def test_features_in_bf16_and_compiled(
    siglip: Path, setting: dict[str, object], close: float
) -> None:
    pixels = np.stack([images.to_pixels(draw(0, "x", index, 16)[0], 16) for index in range(6)])
    ids = [str(index) for index in range(6)]
    plain, other = (
        shards.vectors(
            Featurizer(
                str(siglip), Recipe.model_validate({"features": {"batch_size": 4, **given}})
            ).rows(pixels, ids, "x")
        ).astype(np.float32)
        for given in ({}, setting)
    )
    np.testing.assert_allclose(other, plain, atol=close)
    rounding = np.maximum(np.spacing(np.abs(plain).astype(np.float16)).astype(np.float32), 1e-6)
    beyond = (np.abs(other - plain) > rounding).any()
    assert beyond == ("precision" in setting), (
        "bf16 is another precision; compiled, only float16 rounding may differ"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_told_and_cpu_may_stand_in() -> None:
    with pytest.raises(ConfigError, match=r"gpus_per_worker=0\.5, but torch .* sees no GPU on"):
        actor_device(Resources(gpus_per_worker=0.5))
    assert actor_device(Resources(gpus_per_worker=0.5, device="cpu")).type == "cpu"
