"""SemHiTok as a whole: stages that train what they should, codes that come back, files that stand
alone.

Covers: tokenizers/loading.py, tokenizers/pixel.py, tokenizers/saved.py, tokenizers/semantic.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smalti.errors import ArtifactError, ConfigError, DataError, VocabularyError
from smalti.schema import SemanticStage, VitSize
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.loading import load_tokenizer
from smalti.tokenizers.losses import PixelLoss
from smalti.tokenizers.quantizers import EMAStats
from smalti.tokenizers.semantic import pca_projection
from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok

Make = Callable[..., SemHiTok]


def semantic_of(vq: str = "ema", dim: int = 6, num_codes: int = 10) -> SemanticTokenizer:
    stage = SemanticStage(dim=dim, vq=vq, decoder_dim=16, decoder_heads=2, decoder_layers=1)
    return SemanticTokenizer(24, stage, num_codes, (4, 4))


def semantic_ids(tokenizer: SemHiTok, pixels: Tensor) -> Tensor:
    """Semantic codes of images: int64 (B, T)."""
    assert tokenizer.semantic is not None
    assert tokenizer.encoder is not None
    return tokenizer.semantic.encode(tokenizer.encoder(pixels))


def start_codebook(
    tokenizer: PixelTokenizer, vectors_BND: Tensor, ids_BN: Tensor | None, seed: int = 0
) -> None:
    """Start the pixel codebooks from vectors (B, N, D), through the `init_from` that the pixel
    phase calls.
    """
    book, generator = tokenizer.codebook, torch.Generator().manual_seed(seed)
    ids_T = (
        torch.zeros(vectors_BND.shape[:2].numel(), dtype=torch.int64)
        if ids_BN is None
        else ids_BN.flatten()
    )
    book.init_from(vectors_BND.flatten(0, 1), ids_T, generator)


# --- semantic stage -------------------------------------------------------------------------------


@pytest.mark.parametrize("vq", ["ema", "vanilla", "norm"])
@pytest.mark.parametrize("distill", ["cosine", "l2"])
def test_the_semantic_stage_learns(
    vq: str, distill: str, encoder: VisionEncoder, pixels: Tensor
) -> None:
    tokenizer = semantic_of(vq)
    tokenizer.stage = tokenizer.stage.model_copy(update={"distill": distill})
    features = encoder(torch.cat([pixels, pixels.flip(-1), -pixels]))
    tokenizer.init_from(features.flatten(0, 1)[:: len(features.flatten(0, 1)) // 10][:10])
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 3e-3)
    history = []
    for _ in range(40):
        loss, metrics, stats = tokenizer(features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokenizer.after_step(stats)
        history.append(float(metrics["distill"]))
    assert history[-1] < 0.8 * history[0]
    assert (stats is None) == (vq != "ema")


def test_semantic_gradients_reach_all_that_trains_and_no_ema_buffer(
    encoder: VisionEncoder, pixels: Tensor
) -> None:
    tokenizer = semantic_of()
    before = tokenizer.codes.clone()
    loss, _, stats = tokenizer(encoder(pixels))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tokenizer.parameters())
    assert not any(name.startswith("quantizer") for name, _ in tokenizer.named_parameters())
    assert torch.equal(before, tokenizer.codes), "forward moves nothing"
    tokenizer.after_step(stats)
    assert not torch.equal(before, tokenizer.codes)


def test_merged_micro_batches_train_like_one_batch(encoder: VisionEncoder, pixels: Tensor) -> None:
    whole, parts = semantic_of(), semantic_of()
    parts.load_state_dict(whole.state_dict())
    features = encoder(pixels)
    whole.after_step(whole(features)[2])
    parts.after_step(EMAStats.merge([parts(features[:1])[2], parts(features[1:])[2]]))
    torch.testing.assert_close(whole.codes, parts.codes)


@pytest.mark.parametrize("dim", [3, 24, 40])
def test_init_from_is_the_pca_of_the_centroids(dim: int) -> None:
    centroids = torch.randn(30, 24) * torch.linspace(5, 0.1, 24) + 3
    tokenizer = semantic_of(dim=dim, num_codes=30)
    tokenizer.init_from(centroids)
    assert torch.equal(tokenizer.encode(centroids), torch.arange(30))
    projected = tokenizer.project(centroids).detach().double()
    torch.testing.assert_close(projected.float(), tokenizer.codes)
    torch.testing.assert_close(projected.mean(0), torch.zeros(dim).double(), rtol=0, atol=1e-5)
    assert float(projected.square().mean()) == pytest.approx(1, rel=1e-4)
    values = torch.linalg.eigvalsh(torch.cov(centroids.double().T)).flip(0)
    mine = torch.linalg.eigvalsh(torch.cov(projected.T)).flip(0)[: min(dim, 24)]
    kept = values[: min(dim, 24)]
    torch.testing.assert_close(mine / mine.sum(), kept / kept.sum(), rtol=1e-3, atol=1e-5)
    gram = tokenizer.proj.weight.detach() @ tokenizer.proj.weight.detach().T
    if dim <= 24:
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(dim), rtol=0, atol=1e-4)
    else:
        assert bool((projected.std(0) > 1e-3).all()), "no channel is dead"


def test_pca_does_not_depend_on_signs_and_init_checks() -> None:
    x = torch.randn(20, 5)
    assert torch.equal(pca_projection(x, 3)[0], pca_projection(x.clone(), 3)[0])
    weight, _ = pca_projection(x, 5)
    torch.testing.assert_close(weight @ weight.T, torch.eye(5), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(10, 24\)"):
        semantic_of().init_from(torch.zeros(10, 5))
    with pytest.raises(ValueError, match="NaN"):
        semantic_of().init_from(torch.full((10, 24), float("nan")))


def test_a_semantic_tokenizer_without_a_grid_takes_a_square() -> None:
    stage = SemanticStage(dim=4, decoder_dim=16, decoder_heads=2, decoder_layers=1)
    tokenizer = SemanticTokenizer(24, stage, 5)
    assert tokenizer(torch.randn(1, 9, 24))[0].ndim == 0
    with pytest.raises(ValueError, match="not a square"):
        tokenizer(torch.randn(1, 8, 24))


# --- pixel stage ----------------------------------------------------------------------------------


def train_pixel(tokenizer: SemHiTok, pixels: Tensor, steps: int = 5) -> float:
    """Steps of the pixel stage on the whole tokenizer's parts, as a bare loop; the last loss."""
    part = tokenizer.pixel.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(part.parameters(), 3e-3)
    loss_of = PixelLoss(part.stage.loss)
    ids = (
        None if tokenizer.semantic is None else tokenizer.semantic.encode(tokenizer.encoder(pixels))
    )
    for _ in range(steps):
        out = part(pixels, ids)
        loss = loss_of(out.pixels, pixels)[0] + part.stage.vq_weight * out.vq_loss
        if out.semantic_only is not None:
            loss = loss + loss_of(out.semantic_only, pixels)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    part.requires_grad_(False).eval()
    return float(loss.detach())


@pytest.mark.parametrize("concat", ["dim", "length", "none"])
def test_pixel_training_leaves_the_semantic_codebook_and_encoder_bit_identical(
    concat: str, make_tokenizer: Make, pixels: Tensor
) -> None:
    tokenizer = make_tokenizer(concat=concat, semantic_only_decoder=True)
    frozen = {
        n: t.clone()
        for n, t in tokenizer.state_dict().items()
        if n.startswith(("semantic.", "encoder."))
    }
    codes_seen = tokenizer.pixel.semantic_codes.clone()
    ids = semantic_ids(tokenizer, pixels)
    first, last = train_pixel(tokenizer, pixels, 1), train_pixel(tokenizer, pixels, 30)
    assert last < first
    after = tokenizer.state_dict()
    assert len(frozen) > 20
    assert all(torch.equal(t, after[n]) for n, t in frozen.items())
    assert torch.equal(codes_seen, tokenizer.pixel.semantic_codes)
    assert torch.equal(ids, semantic_ids(tokenizer, pixels))


def test_gradients_of_each_loss_go_where_they_should(make_tokenizer: Make, pixels: Tensor) -> None:
    tokenizer = make_tokenizer(semantic_only_decoder=True)
    part, ids = tokenizer.pixel.requires_grad_(True).train(), semantic_ids(tokenizer, pixels)

    def reached(loss: Tensor) -> set[str]:
        part.zero_grad()
        loss.backward(retain_graph=True)
        return {
            n.split(".")[0]
            for n, p in part.named_parameters()
            if p.grad is not None and bool(p.grad.any())
        }

    out = part(pixels, ids)
    assert reached(out.pixels.square().mean()) == {"encoder", "decoder"}
    assert reached(out.vq_loss) == {"encoder", "codebook"}
    assert reached(out.semantic_only.square().mean()) == {"semantic_only_decoder"}
    every = out.pixels.square().mean() + out.vq_loss + out.semantic_only.square().mean()
    reached(every)
    dead = [n for n, p in part.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == [], "every parameter of the pixel stage trains"


def test_before_quantisation_the_vectors_themselves_are_decoded(
    make_tokenizer: Make, pixels: Tensor
) -> None:
    part, ids = make_tokenizer().pixel, semantic_ids(make_tokenizer(), pixels)
    out = part(pixels, ids, quantize=False)
    assert out.codes is None
    assert float(out.vq_loss) == 0
    start_codebook(part, out.vectors, ids)
    after = part(pixels, ids)
    assert after.codes.shape == (3, 16)
    assert float((after.pixels - out.pixels).abs().mean()) < float(out.pixels.abs().mean())


def test_started_codebooks_lower_the_quantisation_error(
    make_tokenizer: Make, pixels: Tensor
) -> None:
    for guidance in (True, False):
        tokenizer = make_tokenizer(guidance)
        ids = semantic_ids(tokenizer, pixels) if guidance else None
        before = tokenizer.pixel(pixels, ids)
        start_codebook(tokenizer.pixel, before.vectors, ids)
        assert tokenizer.pixel(pixels, ids).vq_loss < 0.5 * before.vq_loss


def test_a_replaced_decoder_is_all_that_trains(
    make_tokenizer: Make, pixels: Tensor, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    part, codes = tokenizer.pixel.requires_grad_(True), tokenizer.encode(pixels)
    rest = {n: t.clone() for n, t in part.state_dict().items() if not n.startswith("decoder.")}
    part.replace_decoder(VitSize(dim=24, layers=2, heads=2, mlp_ratio=2))
    trained = {n.split(".")[0] for n, p in part.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}
    optimizer = torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        out = part(pixels, semantic_ids(tokenizer, pixels))
        (out.pixels - pixels).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(t, part.state_dict()[n]) for n, t in rest.items())
    assert torch.equal(codes, tokenizer.encode(pixels))
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(load_tokenizer(tmp_path).decode(codes), tokenizer.decode(codes))


def test_guidance_and_its_options_are_checked(
    section: Callable[..., object], encoder: VisionEncoder
) -> None:
    settings = section(guidance=False, semantic_only_decoder=True)
    with pytest.raises(ConfigError, match="semantic_only_decoder"):
        PixelTokenizer(settings.pixel, None, 32, (4, 4), num_codes=4)
    with pytest.raises(ConfigError, match="number of codes"):
        PixelTokenizer(section(guidance=False).pixel, None, 32, (4, 4))
    part = PixelTokenizer(section().pixel, torch.randn(10, 6), 32, (4, 4))
    with pytest.raises(ValueError, match="semantic codes"):
        part(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="neither"):
        SemHiTok(section(), part, None, encoder)
    with pytest.raises(ConfigError, match="64 px"):
        SemHiTok(
            section(),
            PixelTokenizer(section().pixel, torch.randn(10, 6), 64, (4, 4)),
            semantic_of(),
            encoder,
        )


def test_bf16_training_keeps_codes_exact(make_tokenizer: Make, pixels: Tensor) -> None:
    tokenizer = make_tokenizer()
    part, ids = tokenizer.pixel, semantic_ids(tokenizer, pixels)
    codes = part.semantic_codes.clone()
    part.to(torch.bfloat16).requires_grad_(True)
    out = part(pixels, ids)
    (out.pixels.float().square().mean() + out.vq_loss).backward()
    assert part.semantic_codes.dtype == torch.float32
    assert torch.equal(codes, part.semantic_codes)
    assert out.pixels.dtype == torch.bfloat16
    assert out.vq_loss.dtype == torch.float32
    loss, _, _stats = (
        tokenizer.semantic.to(torch.bfloat16)
        .requires_grad_(True)
        .train()(tokenizer.encoder(pixels))
    )
    loss.backward()
    assert loss.dtype == torch.float32


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [True, False])
def test_codes_shapes_ranges_and_determinism(
    guidance: bool, make_tokenizer: Make, pixels: Tensor
) -> None:
    tokenizer = make_tokenizer(guidance)
    codes = tokenizer.encode(pixels)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, 16)
    assert tokenizer.num_codes == 30
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 30
    image = tokenizer.decode(codes)
    assert image.shape == (3, 3, 32, 32)
    assert image.dtype == torch.float32
    assert float(image.abs().max()) <= 1
    assert torch.equal(tokenizer.encode(pixels.clone()), codes)
    assert torch.equal(tokenizer.decode(codes), image)
    assert torch.equal(tokenizer.decode(codes.to(torch.int32)), image)
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert not tokenizer.train().training


def test_flat_codes_hold_the_semantic_code_and_embed_is_both_vectors(
    make_tokenizer: Make, pixels: Tensor
) -> None:
    tokenizer = make_tokenizer()
    codes, i = tokenizer.encode(pixels), semantic_ids(tokenizer, pixels)
    assert torch.equal(codes // 3, i)
    vectors = tokenizer.embed(codes)
    assert tokenizer.embed_splits == (6, 4)
    assert vectors.shape == (3, 16, 10)
    assert torch.equal(vectors[..., :6], tokenizer.semantic.codes[i])
    assert torch.equal(
        vectors[..., 6:], tokenizer.pixel.codebook.codes.view(10, 3, 4)[i, codes % 3]
    )
    assert torch.equal(tokenizer.code_vectors()[codes], vectors)


def test_without_guidance_codes_are_pixel_codes_and_no_encoder_is_kept(
    make_tokenizer: Make, pixels: Tensor, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(guidance=False)
    assert tokenizer.embed_splits == (4,)
    assert tokenizer.num_semantic == 0
    assert torch.equal(tokenizer.code_vectors(), tokenizer.pixel.codebook.codes)
    assert tokenizer.semantic is None
    tokenizer.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_tokenizer(tmp_path).encode(pixels), tokenizer.encode(pixels))


def test_decode_looks_at_both_halves(make_tokenizer: Make, pixels: Tensor) -> None:
    tokenizer = make_tokenizer(semantic_only_decoder=True)
    codes = tokenizer.encode(pixels)
    other_sub = codes // 3 * 3 + (codes + 1) % 3
    assert not torch.equal(tokenizer.decode(codes), tokenizer.decode(other_sub))
    assert torch.equal(
        tokenizer.decode_semantic_only(codes), tokenizer.decode_semantic_only(other_sub)
    )
    assert not torch.equal(tokenizer.decode(codes), tokenizer.decode((codes + 3) % 30))
    with pytest.raises(ConfigError, match="semantic_only_decoder"):
        make_tokenizer().decode_semantic_only(codes)


SKIPPING = VitSize(dim=16, layers=1, heads=2, mlp_ratio=2, skip=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"concat": "length", "semantic_only_decoder": True},
        {"guidance": False},
        {"encoder": SKIPPING, "decoder": SKIPPING},
    ],
)
def test_saved_and_loaded_is_bit_identical_and_stands_alone(
    settings: dict[str, object], make_tokenizer: Make, pixels: Tensor, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(**settings)
    tokenizer.save_pretrained(tmp_path / "a" / "tok")
    moved = (tmp_path / "a").rename(tmp_path / "b") / "tok"
    again = load_tokenizer(moved)
    mine, theirs = tokenizer.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    codes = tokenizer.encode(pixels)
    assert torch.equal(again.encode(pixels), codes)
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))
    assert torch.equal(again.code_vectors(), tokenizer.code_vectors())
    assert again.section == tokenizer.section
    again.save_pretrained(tmp_path / "c")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "c" / name).read_bytes() == (moved / name).read_bytes()


def test_saved_to_a_url(make_tokenizer: Make, pixels: Tensor) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained("memory://store/run/tokenizer")
    assert torch.equal(
        load_tokenizer("memory://store/run/tokenizer").encode(pixels), tokenizer.encode(pixels)
    )


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.zeros(1, 15, dtype=torch.int64), r"\(1, 15\)"),
        (torch.zeros(16, dtype=torch.int64), r"\(16,\)"),
        (torch.full((1, 16), 30), "this tokenizer has 30"),
        (torch.full((1, 16), -1), "-1"),
        (torch.zeros(1, 16), "float32"),
        (torch.zeros(1, 16, dtype=torch.bool), "bool"),
        ([[0] * 16], "list"),
    ],
)
def test_codes_are_checked(codes: Tensor, said: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(semantic_only_decoder=True)
    for call in (tokenizer.decode, tokenizer.decode_semantic_only):
        with pytest.raises(VocabularyError, match=said):
            call(codes)


def test_embed_takes_any_shape_but_no_foreign_code(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.embed(torch.tensor([3, 4])).shape == (2, 10)
    assert tokenizer.embed(torch.empty(0, 16, dtype=torch.int64)).shape == (0, 16, 10)
    with pytest.raises(VocabularyError, match="has 30"):
        tokenizer.embed(torch.tensor([30]))


def test_pixels_are_checked_before_encoding(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="31"):
        tokenizer.encode(torch.zeros(1, 3, 31, 32))
    with pytest.raises(DataError, match="uint8"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    nothing = tokenizer.encode(torch.zeros(0, 3, 32, 32))
    assert nothing.shape == (0, 16)
    assert tokenizer.decode(nothing).shape == (0, 3, 32, 32)


def test_what_is_no_tokenizer_is_told(make_tokenizer: Make, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        load_tokenizer(tmp_path)
    config = tmp_path / "config.json"
    for text, said in (
        ('{"model_type": "qwen2"}', "None"),
        ('{"system": "other"}', "'other'"),
        ("[1]", "list"),
    ):
        config.write_text(text)
        with pytest.raises(ArtifactError, match=said):
            load_tokenizer(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    good = json.loads(config.read_text())
    for broken, said in (
        (good | {"format": 99}, "format 99"),
        ({k: v for k, v in good.items() if k != "grid"}, "grid"),
        (good | {"tokenizer": {"guidence": True}}, "guidence"),
        (good | {"num_semantic": 11}, "do not fit"),
        (good | {"encoder_layer": 9}, "layer=9"),
        (good | {"grid": [64, 64]}, "finer"),
    ):
        config.write_text(json.dumps(broken))
        with pytest.raises(ArtifactError, match=said):
            load_tokenizer(tmp_path)
    config.write_text(json.dumps(good))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="damaged"):
        load_tokenizer(tmp_path)
    weights.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load_tokenizer(tmp_path)


def test_torn_json_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"system": ')
    with pytest.raises((ArtifactError, DataError), match=r"config\.json"):
        load_tokenizer(tmp_path)


def test_every_weight_is_in_the_file(make_tokenizer: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    held = set(load_file(tmp_path / "model.safetensors"))
    assert held == {n for n in tokenizer.state_dict() if not n.startswith("encoder.")}
    modules = [m for m in tokenizer.modules() if isinstance(m, nn.Linear)]
    assert len(modules) > 10
