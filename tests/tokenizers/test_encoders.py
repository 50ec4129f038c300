"""The vision encoder: equal to transformers' own model, at any layer, from any of the sizes in use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from smalti.errors import ArtifactError, ConfigError, DataError
from smalti.tokenizers.encoders import VisionEncoder, check_pixels
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(scope="module")
def full_dir(siglip_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`siglip_dir` with a text tokenizer beside it."""
    path = tmp_path_factory.mktemp("full") / "model"
    shutil.copytree(siglip_dir, path)
    words = {"<pad>": 0, "</s>": 1, "a": 2, "red": 3, "blue": 4, "circle": 5, "<unk>": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(path)
    return str(path)


def test_features_equal_those_of_transformers_at_every_layer(
    siglip_dir: str, pixels: Tensor
) -> None:
    model = SiglipVisionModel.from_pretrained(siglip_dir).eval()
    with torch.no_grad():
        out = model(pixel_values=pixels, output_hidden_states=True)
        hidden = out.hidden_states
        assert len(hidden) == 3
        for layer in (0, 1, 2, -2, -3):
            torch.testing.assert_close(
                VisionEncoder.from_pretrained(siglip_dir, layer)(pixels), hidden[layer]
            )
        encoder = VisionEncoder.from_pretrained(siglip_dir)
        torch.testing.assert_close(encoder(pixels), out.last_hidden_state)
        torch.testing.assert_close(encoder.pooled(pixels), out.pooler_output)
        assert not torch.allclose(encoder(pixels), hidden[2]), "-1 is after the final norm"
    assert (encoder.image_size, encoder.patch_size, encoder.grid, encoder.dim) == (
        32,
        8,
        (4, 4),
        24,
    )


def test_bf16_features_are_close_and_float32_ones_to_the_bit_what_they_were(
    siglip_dir: str, pixels: Tensor
) -> None:
    encoder = VisionEncoder.from_pretrained(siglip_dir)
    plain = encoder(pixels)
    encoder.bf16 = True
    low = encoder(pixels)
    assert low.dtype == torch.float32
    assert not torch.equal(low, plain)
    assert torch.cosine_similarity(low, plain, dim=-1).min() > 0.99
    encoder.bf16 = False
    assert torch.equal(encoder(pixels), plain)


@pytest.mark.parametrize(
    ("size", "patch", "side"), [(224, 16, 14), (256, 16, 16), (384, 14, 27), (224, 14, 16)]
)
def test_published_sizes_from_a_vision_only_directory(
    size: int, patch: int, side: int, tmp_path: Path
) -> None:
    config = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=size,
        patch_size=patch,
    )
    SiglipVisionModel(config).save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(str(tmp_path))
    assert encoder.grid == (side, side)
    assert encoder(torch.zeros(1, 3, size, size)).shape == (1, side * side, 8)


def test_half_precision_checkpoints_load_as_float32(
    siglip_dir: str, tmp_path: Path, pixels: Tensor
) -> None:
    SiglipModel.from_pretrained(siglip_dir).to(torch.bfloat16).save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(str(tmp_path))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder(pixels).dtype == torch.float32


def test_frozen_in_eval_mode_with_gradients_to_pixels(siglip_dir: str, pixels: Tensor) -> None:
    encoder = VisionEncoder.from_pretrained(siglip_dir).train()
    assert not any(m.training for m in encoder.modules())
    x = pixels.clone().requires_grad_(True)
    encoder(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in encoder.parameters())


def test_prompts_and_logits_equal_those_of_transformers(full_dir: str, pixels: Tensor) -> None:
    encoder = VisionEncoder.from_pretrained(full_dir)
    texts = ["a red circle", "a blue circle", "circle"]
    ids = torch.tensor([[2, 3, 5, 0, 0, 0], [2, 4, 5, 0, 0, 0], [5, 0, 0, 0, 0, 0]])
    model = SiglipModel.from_pretrained(full_dir).eval()
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(encoder.prompt_embeddings(texts), expected.text_embeds)
    torch.testing.assert_close(encoder.logits(pixels, texts), expected.logits_per_image)
    assert len(encoder.state_dict()) == len(VisionEncoder.from_pretrained(full_dir).state_dict()), (
        "no text weights join"
    )


def test_prompts_need_the_text_side(
    siglip_dir: str, encoder: VisionEncoder, tmp_path: Path
) -> None:
    encoder.save_tower(tmp_path)
    with pytest.raises(ArtifactError, match="only a vision tower"):
        VisionEncoder.from_pretrained(str(tmp_path)).prompt_embeddings(["a"])
    with pytest.raises(ArtifactError, match="no tokenizer"):
        VisionEncoder.from_pretrained(siglip_dir).prompt_embeddings(["a"])


def test_a_saved_tower_is_the_same_encoder(
    encoder: VisionEncoder, tmp_path: Path, pixels: Tensor
) -> None:
    encoder.save_tower(tmp_path)
    assert torch.equal(VisionEncoder.from_pretrained(str(tmp_path))(pixels), encoder(pixels))


def test_other_models_and_absent_ones_are_told(tmp_path: Path, siglip_dir: str) -> None:
    with pytest.raises(ArtifactError, match="not a vision encoder"):
        VisionEncoder.from_pretrained(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2_vision_model"}))
    with pytest.raises(ArtifactError, match="NaFlex"):
        VisionEncoder.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ArtifactError, match="'bert'"):
        VisionEncoder.from_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"encoder\.layer=3"):
        VisionEncoder.from_pretrained(siglip_dir, 3)


def test_torn_and_incomplete_weights_are_told(siglip_dir: str, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(siglip_dir, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="does not load"):
        VisionEncoder.from_pretrained(str(torn))
    from safetensors.torch import load_file, save_file

    short = tmp_path / "lacking"
    shutil.copytree(siglip_dir, short)
    tensors = load_file(short / "model.safetensors")
    del tensors["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="lacks 1 weights"):
        VisionEncoder.from_pretrained(str(short))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 40), r"\(1, 3, 32, 40\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 32, 32), 255.0), "255"),
        (torch.full((1, 3, 32, 32), float("nan")), "NaN"),
        ("picture", "str"),
    ],
)
def test_pixels_are_checked(bad: Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_pixels(bad, 32)


def test_good_pixels_pass() -> None:
    check_pixels(torch.ones(0, 3, 32, 32), 32)
    check_pixels(torch.full((1, 3, 32, 32), 1.0005, dtype=torch.float64), 32)
