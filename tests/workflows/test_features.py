"""The encoder of the shard stages, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smalti import storage
from smalti.errors import ArtifactError
from smalti.mllm.bpe import train_bpe
from smalti.schema import EncoderSection, EncoderTrain, Recipe
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.siglip import build_siglip
from smalti.workflows.encoder import encoder_path
from smalti.workflows.encoder import run as run_encoder
from smalti.workflows.features import open_encoder


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    tokenizer = train_bpe(["a red square"], 259)
    size = EncoderTrain(patch_size=8, hidden_size=16, layers=1, heads=2, text_layers=1, text_length=6)
    build_siglip(size, 16, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def upload(folder: Path, url: str) -> str:
    for file in folder.iterdir():
        storage.write_atomic(storage.join(url, file.name), file.read_bytes())
    return url


def test_an_encoder_in_an_object_store_reads_images_and_texts(siglip: Path, memory_url: str) -> None:
    pixels, local = torch.rand(2, 3, 16, 16), VisionEncoder.from_pretrained(str(siglip), 0)
    for place in (upload(siglip, f"{memory_url}/siglip"), f"file://{siglip}"):
        encoder = open_encoder(place, 0)
        assert torch.equal(encoder(pixels), local(pixels))
        assert torch.equal(encoder.logits(pixels, ["a red square"]), local.logits(pixels, ["a red square"]))


def test_a_recipe_may_name_an_encoder_by_url(siglip: Path, tmp_path: Path) -> None:
    recipe = Recipe(out=str(tmp_path / "out"), encoder=EncoderSection(pretrained=f"file://{siglip}"))
    artifact = run_encoder(recipe)
    assert artifact.counts == {"image_size": 16, "patches": 4, "dim": 16}
    assert open_encoder(encoder_path(artifact), -1).grid == (2, 2)


def test_a_vision_tower_alone_in_an_object_store_reads_images(siglip: Path, memory_url: str, tmp_path: Path) -> None:
    VisionEncoder.from_pretrained(str(siglip)).save_tower(tmp_path / "tower")
    encoder = open_encoder(upload(tmp_path / "tower", f"{memory_url}/tower"), -1)
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, 4, 16)
    with pytest.raises(ArtifactError):
        encoder.prompt_embeddings(["a"])
