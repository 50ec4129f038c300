"""The clustered codebook as a tokenizer: codes against a search written out, its folder, and what
it refuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smalti import storage
from smalti.errors import ArtifactError, ConfigError, DataError, VocabularyError
from smalti.tokenizers import unicode2
from smalti.tokenizers.code_index import CodeIndex, Probes
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.loading import load_tokenizer
from smalti.tokenizers.unicode2 import Unicode2

Make = Callable[..., Unicode2]


@pytest.fixture
def make(encoder: VisionEncoder, pixels: Tensor) -> Make:
    """40 codes near features of real patches, in cells of 8; `probes` of the tree, `spherical`."""

    def made(probes: Probes | None = None, **options: bool) -> Unicode2:
        features_NC = encoder(pixels).flatten(0, 1)[:40]
        codes_KC = features_NC + 0.01 * torch.randn(
            40, encoder.dim, generator=torch.Generator().manual_seed(1)
        )
        if options.get("spherical"):
            codes_KC = torch.nn.functional.normalize(codes_KC, dim=-1)
        cells_PC = codes_KC.unflatten(0, (5, 8)).mean(1)
        return Unicode2(
            encoder, CodeIndex(codes_KC, cells_PC, torch.arange(40) // 8, probes), **options
        )

    return made


def test_a_code_is_the_nearest_to_its_patch(
    make: Make, encoder: VisionEncoder, pixels: Tensor
) -> None:
    tokenizer = make()
    codes_BT = tokenizer.encode(pixels)
    features_NC = encoder(pixels).flatten(0, 1)
    expected_N = torch.cdist(features_NC.double(), tokenizer.code_vectors().double()).argmin(-1)
    assert codes_BT.shape == (3, tokenizer.num_tokens) and codes_BT.dtype == torch.int64
    assert torch.equal(codes_BT.flatten(), expected_N)
    assert torch.equal(codes_BT.flatten()[:40], torch.arange(40)), (
        "each of 40 planted patches has its own code"
    )
    assert torch.equal(tokenizer.embed(codes_BT), tokenizer.code_vectors()[codes_BT])
    assert tokenizer.embed_splits == (encoder.dim,) and tokenizer.num_codes == 40
    assert tokenizer.encode(pixels[:0]).shape == (0, 16)


def test_a_large_codebook_is_searched_as_the_stage_codebook_measured(
    make: Make, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = make().encode(pixels)
    narrow, wide = make(Probes(1, 0.0, 0.5)), make(Probes(5, 1.0, 1.0))
    assert torch.equal(narrow.encode(pixels), exact), "few codes are all compared"
    monkeypatch.setattr(unicode2, "EXACT_CODES", 39)
    assert torch.equal(wide.encode(pixels), exact)
    x_NC = torch.randn(200, narrow.embed_splits[0])
    assert torch.equal(narrow.nearest(x_NC[None])[0], narrow.index.tree(x_NC, 1, 0.0)[0])
    assert not torch.equal(narrow.nearest(x_NC[None]), wide.nearest(x_NC[None]))


def test_autocast_changes_no_code(make: Make) -> None:
    tokenizer = make()
    x_BNC = tokenizer.code_vectors()[None] + 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.nearest(x_BNC)[0], torch.arange(40))


def test_on_the_sphere_only_directions_count(make: Make) -> None:
    tokenizer = make(spherical=True)
    x_BNC = torch.randn(1, 50, tokenizer.embed_splits[0])
    cosine_NK = torch.nn.functional.normalize(x_BNC[0], dim=-1) @ tokenizer.code_vectors().T
    assert torch.equal(tokenizer.nearest(x_BNC)[0], cosine_NK.argmax(-1))
    assert torch.equal(tokenizer.nearest(7 * x_BNC), tokenizer.nearest(x_BNC))


def test_saved_and_loaded_it_gives_the_same_codes(make: Make, pixels: Tensor, place: str) -> None:
    tokenizer = make(Probes(3, 0.75, 0.991), spherical=True)
    tokenizer.save_pretrained(place)
    loaded = load_tokenizer(place)
    assert isinstance(loaded, Unicode2) and loaded.probes == tokenizer.probes and loaded.spherical
    assert torch.equal(loaded.encode(pixels), tokenizer.encode(pixels))
    assert torch.equal(
        loaded.to(torch.float64).to(torch.float32).encode(pixels), tokenizer.encode(pixels)
    )
    config = storage.read_json(storage.join(place, "config.json"))
    assert config["num_codes"] == 40 and config["grid"] == [4, 4] and config["system"] == "unicode2"


def test_a_torn_or_foreign_folder_is_refused(make: Make, tmp_path) -> None:
    make().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor[:-1].clone() for name, tensor in tensors.items()}, weights)
    with pytest.raises(ArtifactError, match="torn"):
        load_tokenizer(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="torn"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"system": "unicode2", "format": 9}))
    with pytest.raises(ArtifactError, match="format 9"):
        load_tokenizer(tmp_path)


def test_what_it_cannot_do_is_said(make: Make, encoder: VisionEncoder) -> None:
    tokenizer = make()
    assert not tokenizer.has_decoder
    with pytest.raises(ConfigError, match=r"no pixel decoder.*diffusion decoder"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(VocabularyError, match="has 40"):
        tokenizer.embed(torch.tensor([40]))
    with pytest.raises(DataError, match="NaN or Inf"):
        tokenizer.nearest(torch.full((1, 2, encoder.dim), torch.nan))
    with pytest.raises(ConfigError, match="codes are 3 wide"):
        Unicode2(encoder, CodeIndex(torch.zeros(2, 3)))
