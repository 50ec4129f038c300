"""DualToken as a whole: where gradients go, codes that come back, files that stand alone.

Covers: workflows/train/memory.py.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from smalti.errors import ArtifactError, ConfigError, DataError, VocabularyError
from smalti.schema import DualStage, VitSize
from smalti.tokenizers.dualtoken import DualModel, DualToken
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.loading import load_tokenizer

STAGE = DualStage(
    codes=12, dim=5, depth=3, pixel_layers=[2, 1], pixel_weights=[1.0, 0.6],
    decoder=VitSize(dim=16, layers=1, heads=2, mlp_ratio=2),
)  # fmt: skip
LAYERS = 4


@pytest.fixture(scope="module")
def towers() -> tuple[VisionEncoder, DualModel]:
    """A frozen tower of four blocks (32 px, 4 x 4 patches), and a model that began with it;
    codebooks from its vectors.
    """
    torch.manual_seed(0)
    size = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    }
    frozen = VisionEncoder(
        SiglipVisionModel(SiglipVisionConfig(**size, image_size=32, patch_size=8)), -2
    )
    model = DualModel(STAGE, copy.deepcopy(frozen))
    with torch.no_grad():
        z_pixel, z_semantic = model.vectors(torch.rand(4, 3, 32, 32) * 2 - 1)
    model.pixel.init_from(z_pixel)
    model.semantic.init_from(z_semantic)
    return frozen, model


@pytest.fixture
def model(towers: tuple[VisionEncoder, DualModel]) -> DualModel:
    return copy.deepcopy(towers[1])


def moved(model: DualModel, loss: Tensor) -> set[str]:
    """Parts of the model that a loss has gradients for: numbers for blocks, names for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    parts = {
        name
        for (name, _), gradient in zip(named, found, strict=True)
        if gradient is not None and gradient.any()
    }
    return {
        n.split("layers.")[1].split(".")[0]
        if "encoder.tower" in n and "layers." in n
        else n.split(".")[0]
        for n in parts
    }


def test_each_loss_reaches_what_it_should(
    towers: tuple[VisionEncoder, DualModel], model: DualModel, pixels: Tensor
) -> None:
    """Reconstruction: the blocks up to the last pixel layer.

    Semantics: those up to the layer before the last. The layers behind it and the pooling head stay
    as they were.
    """
    out = model.train()(pixels, towers[0](pixels) + 0.1)
    assert moved(model, out.pixels.square().mean()) == {
        "encoder",
        "0",
        "1",
        "pixel_down",
        "decoder",
    }
    assert moved(model, out.semantic) == {"encoder", "0", "1", "2", "semantic_down", "semantic_up"}
    assert moved(model, out.commitment) == {"encoder", "0", "1", "2", "pixel_down", "semantic_down"}
    alone = DualModel(STAGE.model_copy(update={"semantic_weight": 0.0}), model.encoder).train()(
        pixels, towers[0](pixels)
    )
    assert not float(alone.semantic.detach()) and "2" not in moved(model, alone.commitment), (
        "reconstruction alone"
    )
    stays = {name for name, p in model.encoder.tower.named_parameters() if not p.requires_grad}
    assert stays == {
        n
        for n, _ in model.encoder.tower.named_parameters()
        if n.startswith(("encoder.layers.3", "post", "head"))
    }


def test_losses_by_hand(
    towers: tuple[VisionEncoder, DualModel], model: DualModel, pixels: Tensor
) -> None:
    """Against transformers' own hidden states: z_pix = W (h2 + 0.6 h1) + b, and both distances to
    F0.
    """
    frozen, model = towers[0], model.train()
    states = model.encoder.tower(pixels, output_hidden_states=True).hidden_states
    target = frozen(pixels)
    torch.testing.assert_close(target, states[3])
    z_pixel, z_semantic = model.vectors(pixels)
    torch.testing.assert_close(z_pixel, model.pixel_down(states[2] + 0.6 * states[1]))
    torch.testing.assert_close(z_semantic, model.semantic_down(states[3]))
    out = model(pixels, target + 1)
    rebuilt = model.semantic_up(model.semantic.embed(out.codes[..., 1, :]))
    torch.testing.assert_close(out.distance, F.mse_loss(rebuilt, target + 1))
    torch.testing.assert_close(out.semantic, F.mse_loss(rebuilt, target + 1) + 1)
    torch.testing.assert_close(
        out.commitment, model.pixel(z_pixel).loss + model.semantic(z_semantic).loss
    )
    assert out.stats[0].counts.sum() == out.stats[1].counts.sum() == 3 * 16 * 3
    whole = model(pixels, target, quantize=False)
    assert whole.codes is None and float(whole.commitment) == 0
    torch.testing.assert_close(whole.pixels, model.decoder(z_pixel))


def test_activations_of_the_tower_can_be_computed_again(model: DualModel, pixels: Tensor) -> None:
    from smalti.workflows.train.memory import blocks_of, recompute

    target, runs = model.encoder(pixels).detach() + 0.1, []
    plain = [p.grad for p in backward(model.train(), pixels, target)]
    for block in blocks_of(model):
        count(block, runs)
        recompute(block)
    again = backward(model, pixels, target)
    assert len(runs) == 2 * 4, "three blocks of the tower and one of the decoder, twice each"
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs)
    assert all(block.training for block in model.encoder.tower.encoder.layers)
    assert not any(module.training for module in DualToken(model).modules())


def count(block: torch.nn.Module, runs: list[int]) -> None:
    """Note every run of the block's own forward."""
    forward = block.forward

    def run(*args: object, **kwargs: object) -> object:
        runs.append(1)
        return forward(*args, **kwargs)

    block.forward = run  # type: ignore[method-assign]


def backward(model: DualModel, pixels: Tensor, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(pixels, target)
    (out.pixels.square().mean() + out.semantic + out.commitment).backward()
    return [p for p in model.parameters() if p.requires_grad]


def test_pooled_is_the_tower_where_codes_rebuild_its_state(
    model: DualModel, pixels: Tensor
) -> None:
    """With codes and projections that lose nothing, the embedding through codes is transformers'
    pooled output.
    """
    state = model.encoder(pixels).detach()
    wide = DualModel(STAGE.model_copy(update={"codes": 48 * 3, "dim": 24}), model.encoder)
    with torch.no_grad():
        for linear in (wide.semantic_down, wide.semantic_up):
            linear.weight.copy_(torch.eye(24))
            linear.bias.zero_()
    wide.semantic.init_from(state.repeat(9, 1, 1))
    expected = model.encoder.pooled(pixels)
    torch.testing.assert_close(wide.pooled(wide.encode(pixels)), expected, atol=1e-4, rtol=1e-3)


def test_codes_come_back_and_are_checked(model: DualModel, pixels: Tensor) -> None:
    tokenizer = DualToken(model)
    codes = tokenizer.encode(pixels)
    assert (
        codes.shape == (3, 16, 2, 3) == (3, tokenizer.num_tokens, *tokenizer.code_shape)
        and codes.dtype == torch.int64
    )
    other = codes.clone()
    other[:, :, 1] = (other[:, :, 1] + 1) % 12
    assert tokenizer.decode(codes).shape == pixels.shape
    assert torch.equal(tokenizer.decode(other), tokenizer.decode(codes)), (
        "pixel codes alone are decoded"
    )
    vectors = tokenizer.embed(codes)
    pixel, semantic = tokenizer.code_vectors()
    expected = torch.cat([pixel[codes[:, :, 0]].sum(2), semantic[codes[:, :, 1]].sum(2)], -1)
    torch.testing.assert_close(vectors, expected)
    assert vectors.shape[-1] == sum(tokenizer.embed_splits)
    assert torch.equal(tokenizer.embed(codes[0, 3]), vectors[0, 3])
    for wrong in (codes.flatten(2), codes[:, :5], codes + 12, codes.float()):
        with pytest.raises(VocabularyError):
            tokenizer.decode(wrong)
    with pytest.raises(VocabularyError, match="last axes"):
        tokenizer.embed(codes[..., :2])
    with pytest.raises(DataError):
        tokenizer.encode(pixels[..., :16])
    assert tokenizer.encode(pixels[:0]).shape == (0, 16, 2, 3) and tokenizer.decode(
        codes[:0]
    ).shape == (0, 3, 32, 32)


def test_saved_and_loaded_is_bit_identical_and_stands_alone(
    model: DualModel, pixels: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        for p in model.encoder.tower.parameters():
            p.add_(0.01)
    tokenizer = DualToken(model)
    tokenizer.save_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = load_tokenizer(tmp_path / "b")
    assert isinstance(loaded, DualToken) and not any(p.requires_grad for p in loaded.parameters())
    codes = tokenizer.encode(pixels)
    assert torch.equal(loaded.encode(pixels), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert torch.equal(loaded.pooled(codes), tokenizer.pooled(codes))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="Save the tokenizer again"):
        load_tokenizer(tmp_path / "b")


@pytest.mark.parametrize(
    ("layer", "layers", "told"),
    [
        (-1, [1], "Set encoder.layer=-2"),
        (4, [1], "Set encoder.layer=-2"),
        (-2, [4], "pixel_layers=[4], expected distinct blocks from 1 to 3"),
        (-2, [2, 2], "distinct blocks"),
    ],
)
def test_layers_that_do_not_fit_are_told(
    towers: tuple[VisionEncoder, DualModel], layer: int, layers: list, told: str
) -> None:
    encoder = VisionEncoder(copy.deepcopy(towers[0].tower), layer)
    stage = DualStage(pixel_layers=layers, pixel_weights=[1.0] * len(layers))
    with pytest.raises(ConfigError) as caught:
        DualModel(stage, encoder)
    assert told in str(caught.value)
