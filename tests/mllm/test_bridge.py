"""The bridge to a diffusion decoder: its loss written out, what it learns, its folder, and what the
decoder receives.

Covers: mllm/diffusion.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from smalti.errors import ArtifactError, ConfigError
from smalti.mllm.bpe import train_bpe
from smalti.mllm.bridge import (
    CODES,
    Bridge,
    BridgeLoss,
    Conditioning,
    Shape,
    info_nce,
    load_bridge,
    save_bridge,
)
from smalti.mllm.diffusion import Diffuser, PromptSide
from smalti.schema import BridgeSection
from smalti.workflows.smoke import _tiny_diffuser

SECTION = BridgeSection(decoder="x", width=16, layers=1, heads=2)
SHAPE = Shape(tokens=4, code_width=6, length=3, width=5, pooled=7)
PROMPTS = ["a red circle", "a blue circle", "a green rectangle", "a red circle"]


def sample(num: int) -> tuple[torch.Tensor, Conditioning, torch.Tensor]:
    """Code vectors, what their prompts are worth, and the prompts' ids, all different."""
    wanted = Conditioning(torch.randn(num, 3, 5), torch.randn(num, 7))
    return torch.randn(num, 4, 6), wanted, torch.arange(num)[:, None].repeat(1, 3)


def test_info_nce_by_hand_leaves_equal_prompts_out() -> None:
    found, wanted = torch.randn(3, 2, 5), torch.randn(4, 2, 5)
    same = torch.zeros(3, 4, dtype=torch.bool)
    same[torch.arange(3), torch.arange(3) + 1] = True
    same[0, 3] = True  # the prompt of row 3 is that of the first image, word for word
    loss, hit = info_nce(found, wanted, same, first=1, temperature=0.5)
    total, hits = 0.0, 0
    for image in range(3):
        others = [m for m in range(4) if m == image + 1 or not same[image, m]]
        cosines = torch.cosine_similarity(found[image][None], wanted[others], dim=-1) / 0.5
        total += float(-cosines.log_softmax(0)[others.index(image + 1)].sum())
        hits += others[int(cosines.mean(1).argmax())] == image + 1
    assert float(loss) == pytest.approx(total / 6, rel=1e-5) and float(hit) == pytest.approx(
        hits / 3
    )


def test_two_workers_learn_what_one_does() -> None:
    vectors, wanted, prompts = sample(6)
    model = BridgeLoss(Bridge(SECTION, SHAPE))
    model(vectors, wanted, prompts)[0].backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    every = {x.shape[1:]: x for x in (prompts, wanted.sequence, wanted.pooled[:, None])}
    for rank in range(2):
        part = slice(3 * rank, 3 * rank + 3)
        own = Conditioning(wanted.sequence[part], wanted.pooled[part])
        loss, _ = model(
            vectors[part], own, prompts[part], lambda rows: every[rows.shape[1:]], 3 * rank
        )
        (loss / 2).backward()
    for one, parameter in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-4, atol=1e-6)


def test_it_learns_a_planted_mapping_that_holds_for_other_images() -> None:
    torch.manual_seed(0)
    mix = torch.randn(6, 5)

    def planted(num: int) -> tuple[torch.Tensor, Conditioning, torch.Tensor]:
        vectors = torch.randn(num, 1, 6) + 0.1 * torch.randn(num, 4, 6)
        wanted = (vectors.mean(1) @ mix)[:, None].expand(-1, 3, -1).contiguous()
        return vectors, Conditioning(wanted, None), torch.arange(num)[:, None]

    model = BridgeLoss(Bridge(SECTION, SHAPE._replace(pooled=0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss, _ = model(*planted(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics = model(*planted(64))[1]
    assert metrics["retrieval"] > 0.8 and metrics["squared_error"] < 0.5, metrics


def test_saved_and_loaded_it_gives_the_same(tmp_path: Path) -> None:
    bridge, codes_VC = Bridge(SECTION, SHAPE), torch.randn(9, 6)
    save_file({"codes": codes_VC}, tmp_path / CODES)
    save_bridge(str(tmp_path), bridge)
    loaded, found_VC = load_bridge(str(tmp_path))
    assert torch.equal(found_VC, codes_VC) and loaded.section == SECTION
    vectors = codes_VC[torch.tensor([[1, 2, 3, 4]])]
    for one, other in zip(loaded(vectors), bridge(vectors), strict=True):
        assert torch.equal(one, other)
    settings = tmp_path / "bridge.json"
    settings.write_text(settings.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(ArtifactError, match="format 7"):
        load_bridge(str(tmp_path))


def test_what_a_stable_diffusion_is_conditioned_on(tmp_path: Path) -> None:
    folder = _tiny_diffuser(str(tmp_path / "sd"))
    side = PromptSide.from_pretrained(folder)
    ids = side.tokenize(PROMPTS)
    given = side(ids)
    assert given.pooled is None and given.sequence.shape == (4, 12, 16)
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval()
    torch.testing.assert_close(given.sequence, encoder(ids["text_encoder"]).last_hidden_state)
    assert torch.equal(given.sequence[0], given.sequence[3]) and not torch.equal(
        given.sequence[0], given.sequence[1]
    )
    assert not any(p.requires_grad for p in side.parameters())
    shapes = PromptSide.from_pretrained(folder, meta=True)
    assert sum(p.numel() for p in shapes.parameters()) == sum(p.numel() for p in side.parameters())


def test_what_sdxl_is_conditioned_on(tmp_path: Path) -> None:
    """Two encoders side by side, each before its last block, and the pooled embedding of the
    second.
    """
    tokenizer, made = train_bpe(PROMPTS, 290), {}
    tokenizer.model_max_length = 8
    index: dict[str, object] = {"_class_name": "StableDiffusionXLPipeline"}
    for name, kind, width in (
        ("text_encoder", CLIPTextModel, 8),
        ("text_encoder_2", CLIPTextModelWithProjection, 12),
    ):
        config = CLIPTextConfig(
            vocab_size=300, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=8, projection_dim=10, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        made[name] = kind(config).eval()
        made[name].save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name.replace("text_encoder", "tokenizer"))
        index[name] = ["transformers", kind.__name__]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    side = PromptSide.from_pretrained(str(tmp_path))
    ids = side.tokenize(PROMPTS)
    given = side(ids)
    out = {name: made[name](ids[name], output_hidden_states=True) for name in made}
    expected = torch.cat([out[name].hidden_states[-2] for name in made], -1)
    torch.testing.assert_close(given.sequence, expected)
    assert given.pooled is not None
    torch.testing.assert_close(given.pooled, out["text_encoder_2"].text_embeds)
    assert given.shape(4, 6) == (4, 6, 8, 20, 10)


def test_decoders_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no pipeline of diffusers: its model_index\.json"):
        PromptSide.from_pretrained(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioPipeline"}')
    with pytest.raises(ConfigError, match=r"is a AudioPipeline; .*StableDiffusionXLPipeline"):
        PromptSide.from_pretrained(str(tmp_path))


def test_without_diffusers_nothing_is_drawn_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("smalti.mllm.diffusion.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install diffusers"):
        Diffuser("anything", torch.device("cpu"))


def test_conditioning_draws_what_its_prompt_draws(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    folder = _tiny_diffuser(str(tmp_path / "sd"))
    side, decoder = PromptSide.from_pretrained(folder), Diffuser(folder, torch.device("cpu"))
    embeds = decoder.pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)[0]
    given = side(side.tokenize(PROMPTS))
    torch.testing.assert_close(given.sequence, embeds)
    drawn = decoder.draw(given, range(4), 2, 3.5)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    by_prompt = decoder.pipeline(
        PROMPTS, num_inference_steps=2, guidance_scale=3.5, generator=generators
    ).images
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in by_prompt]
    again = decoder.draw(Conditioning(given.sequence[1:2], None), [1], 2, 3.5)
    assert again[0].size == drawn[1].size
