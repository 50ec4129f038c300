"""Visual places of several codes: losses and drawing against a reference, sequences, files.

Covers: mllm/depth_head.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import ArtifactError, ConfigError, VocabularyError
from smalti.mllm.adapters import SingleAdapter
from smalti.mllm.bpe import train_bpe
from smalti.mllm.build import load_unified, save_unified
from smalti.mllm.depth import DepthModel, PlaceBuilder, draw_places
from smalti.mllm.export import export
from smalti.mllm.generation import answer
from smalti.mllm.inference import VisualModel
from smalti.mllm.prompts import TextEncoder
from smalti.mllm.sequences import collate
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import DepthHeads, DualStage, Mixture, Sampling, VitSize
from smalti.tokenizers.dualtoken import DualModel, DualToken
from smalti.tokenizers.encoders import VisionEncoder

K, W, R, T = 7, 3, 3, 4
TEXTS = ["a blue circle", "a red square", "is it red?", "yes", "no"] * 4
SIZE = DepthHeads(layers=2, heads=4, mlp_ratio=2)


@pytest.fixture(scope="module")
def made() -> tuple[DepthModel, Any]:
    """A Qwen2 of width 32 with heads of two layers, and weights large enough that outputs differ
    clearly.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    hf_tokenizer = train_bpe(TEXTS, 290)
    config = Qwen2Config(
        vocab_size=len(hf_tokenizer) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    lm = Qwen2ForCausalLM(config)
    vocabulary = VisualVocabulary.extend(hf_tokenizer, 1)
    model = DepthModel(
        lm, SingleAdapter((W, W), 16, 32), torch.randn(2, K, W), vocabulary, size=SIZE, depth=R
    )
    model.start_visual()
    with torch.no_grad():
        for p in model.heads.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model.eval(), hf_tokenizer


def builder(made: tuple[DepthModel, Any], **settings: Any) -> PlaceBuilder:
    model, hf_tokenizer = made
    return PlaceBuilder(hf_tokenizer, model.vocabulary, num_codes=K, code_shape=(2, R), **settings)


def row(seed: int, **more: Any) -> dict[str, Any]:
    codes = np.random.default_rng(seed).integers(0, K, (T, 2, R), dtype=np.int32)
    return {
        "codes": codes,
        "caption": TEXTS[seed % 2],
        "qa": [{"question": "is it red?", "answer": "yes"}],
        **more,
    }


def sequences(made: tuple[DepthModel, Any], **settings: Any) -> list[Any]:
    """An image drawn, one described, one asked about, and a text."""
    make, rng = builder(made, mixture=Mixture(text=1.0), **settings), np.random.default_rng(0)
    kinds = ("caption_to_image", "image_to_caption", "qa")
    return [make.build(kind, row(n), rng) for n, kind in enumerate(kinds)] + [
        make.build("text", {"text": "no"}, rng)
    ]


def logits_by_hand(model: DepthModel, hidden_H: Tensor, codes_PR: Tensor) -> Tensor:
    """Logits of every code of a place, each given those before it, one at a time: (P, R, K)."""
    found = []
    for p, head in enumerate(model.heads.values()):
        for d in range(R):
            begun = [hidden_H]
            for before in range(1, d + 1):
                total = sum(model.code_vectors_VC[p, int(codes_PR[p, k])] for k in range(before))
                begun.append(head.code_in(total))
            x = torch.stack(begun) + head.places[: d + 1]
            found.append(head.classifiers[d].weight @ head.body(x[None])[0, -1])
    return torch.stack(found).view(2, R, K)


def test_the_loss_is_the_reference(made: tuple[DepthModel, Any]) -> None:
    """Σ_d −log p(y_d) − log p(z_d) at predicted places, the text's cross entropy elsewhere; a
    weight for places.
    """
    model, _ = made
    one = sequences(made)[0]
    batch = collate([one], model.vocabulary.pad) | {"image_loss_weight": torch.tensor(0.5)}
    loss, metrics = model(batch)
    codes, places = (
        torch.from_numpy(one.codes),
        np.flatnonzero(one.ids == model.vocabulary.first_visual),
    )
    assert len(places) == T
    rows = [
        model.lm.get_input_embeddings().weight[min(i, model.vocabulary.first_visual - 1)]
        for i in one.ids.tolist()
    ]
    for t, place in enumerate(places):
        vector = torch.cat([model.code_vectors_VC[p][codes[t, p]].sum(0) for p in range(2)])
        rows[place] = model.adapter(vector)
    hidden = model.backbone(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0]
    text, image, halves = [], [], []
    for at in range(1, len(one.ids)):
        if at in places:
            t = list(places).index(at)
            lines = F.log_softmax(logits_by_hand(model, hidden[at - 1], codes[t]), -1)
            chosen = lines.gather(-1, codes[t][..., None])[..., 0]
            image.append(-chosen.sum())
            halves.append(-chosen.sum(1))
        else:
            logits = model.lm.get_output_embeddings().weight @ hidden[at - 1]
            text.append(-F.log_softmax(logits, -1)[int(one.ids[at])])
    expected = (torch.stack(text).sum() + 0.5 * torch.stack(image).sum()) / (len(text) + 0.5 * T)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        metrics["loss_image"], torch.stack(image).mean(), rtol=1e-4, atol=1e-4
    )
    pixel, semantic = torch.stack(halves).mean(0)
    torch.testing.assert_close(metrics["loss_pixel"], pixel, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["loss_semantic"], semantic, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["loss_text"], torch.stack(text).mean(), rtol=1e-4, atol=1e-4)


def gradients(model: DepthModel, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def test_two_half_batches_and_packed_rows_come_to_one(made: tuple[DepthModel, Any]) -> None:
    model, _ = made
    every, pad = sequences(made), model.vocabulary.pad
    whole = collate(every, pad, room=10_000)
    assert len(whole["input_ids"]) == 1 and len(whole["codes"]) == 3 * T
    share = model.loss_weight(whole)
    losses = [
        sum(model(collate(part, pad) | {"loss_weight": share})[0] for part in parts)
        for parts in ([[one] for one in every], [every[:1], every[1:]])
    ]
    loss, _ = model(whole)
    found = gradients(model, loss)
    for other in losses:
        torch.testing.assert_close(other, loss)
        for name, gradient in gradients(model, other).items():
            torch.testing.assert_close(gradient, found[name], rtol=1e-3, atol=1e-5)
    assert all(bool(found[name].any()) for name in found if name.startswith(("heads", "adapter")))


def test_places_that_are_only_looked_at_have_no_loss(made: tuple[DepthModel, Any]) -> None:
    """Each predicted place has its own codes, whatever comes before it in the batch."""
    model, _ = made
    drawn, *seen = sequences(made, dense_images=False)
    _, alone = model(collate([drawn], model.vocabulary.pad))
    _, found = model(collate([*seen, drawn], model.vocabulary.pad, room=10_000))
    assert float(found["tokens_image"]) == float(alone["tokens_image"]) == T
    torch.testing.assert_close(found["loss_image"], alone["loss_image"])


def test_a_batch_without_places_runs_the_heads_without_effect(made: tuple[DepthModel, Any]) -> None:
    model, _ = made
    batch = collate(sequences(made)[3:], model.vocabulary.pad)
    assert batch["codes"].shape == (0, 2, R)
    loss, metrics = model(batch)
    found = gradients(model, loss)
    assert not any(bool(g.any()) for n, g in found.items() if n.startswith(("heads", "adapter")))
    assert (
        float(metrics["tokens_image"]) == 0 == float(metrics["loss_image"])
        and float(metrics["loss_text"]) > 0
    )


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_drawing_takes_the_best_code_at_every_depth(
    made: tuple[DepthModel, Any], cfg: float
) -> None:
    """Greedy codes, place by place and depth by depth with guidance, by whole forward passes."""
    model, hf_tokenizer = made
    text, v = TextEncoder(hf_tokenizer, model.vocabulary), model.vocabulary
    prompts = [text.caption_prompt("a red square"), text.caption_prompt("a blue")]
    drawn = draw_places(model, prompts, tokens=T, sampling=Sampling(cfg=cfg, temperature=0.0))
    assert drawn.shape == (2, T, 2, R)

    def last(prompt: list[int], codes: Tensor) -> Tensor:
        ids = torch.tensor([[*prompt, *[v.first_visual] * len(codes)]])
        return model.backbone(inputs_embeds=model.inputs_embeds(ids, codes)).last_hidden_state[
            0, -1
        ]

    for prompt, codes in zip(prompts, drawn, strict=True):
        for t in range(T):
            logits = logits_by_hand(model, last(prompt, codes[:t]), codes[t])
            if cfg != 1:
                empty = logits_by_hand(model, last(text.caption_prompt(None), codes[:t]), codes[t])
                logits = empty + cfg * (logits - empty)
            assert torch.equal(logits.argmax(-1), codes[t])


def test_a_sample_depends_on_its_seed_alone(made: tuple[DepthModel, Any]) -> None:
    model, hf_tokenizer = made
    text = TextEncoder(hf_tokenizer, model.vocabulary)
    prompts = [text.caption_prompt(TEXTS[n]) for n in range(2)]
    draw = {"tokens": T, "sampling": Sampling(cfg=2.0, top_k=5, top_p=0.9)}
    both = draw_places(model, prompts, seed=[4, 5], **draw)
    assert torch.equal(draw_places(model, prompts[1:], seed=[5], **draw), both[1:])
    assert not torch.equal(draw_places(model, prompts, seed=[6, 7], **draw), both)


def test_an_answer_is_the_greedy_one_of_whole_passes(made: tuple[DepthModel, Any]) -> None:
    model, hf_tokenizer = made
    text, v = TextEncoder(hf_tokenizer, model.vocabulary), model.vocabulary
    codes = torch.stack([torch.from_numpy(row(n)["codes"]).long() for n in range(2)])
    questions = ["is it red?", "what?"]
    found = answer(model, hf_tokenizer, v, codes, questions, max_new_tokens=3)
    for image, question, reply in zip(codes, questions, found, strict=True):
        ids = [
            *text.begin(),
            v.und_start,
            *[v.first_visual] * T,
            v.und_end,
            *text.question_prompt(question),
        ]
        begun = len(ids)
        for _ in range(3):
            hidden = model.backbone(
                inputs_embeds=model.inputs_embeds(torch.tensor([ids]), image)
            ).last_hidden_state
            logits = model.lm.get_output_embeddings().weight[: v.num_text] @ hidden[0, -1]
            for banned in text.reserved - {v.eos}:
                if banned < v.num_text:
                    logits[banned] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == v.eos or "\n" in hf_tokenizer.decode(ids[-1:]):
                break
        expected = hf_tokenizer.decode([i for i in ids[begun:] if i != v.eos])
        assert reply == expected.split("\n")[0].strip()


def test_saved_and_loaded_is_the_same(made: tuple[DepthModel, Any], tmp_path: Any) -> None:
    model, hf_tokenizer = made
    save_unified(str(tmp_path), model, hf_tokenizer)
    loaded, _ = load_unified(str(tmp_path))
    assert isinstance(loaded, DepthModel) and loaded.depth == R and loaded.size == SIZE
    batch = collate(sequences(made), model.vocabulary.pad)
    assert torch.equal(loaded(batch)[0], model(batch)[0])


def test_an_export_draws_and_answers_as_the_model_does(
    made: tuple[DepthModel, Any], tmp_path: Any
) -> None:
    """Its plain part loads without this project and has the text side's logits."""
    from PIL import Image
    from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel

    model, hf_tokenizer = made
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tower = VisionEncoder(
        SiglipVisionModel(SiglipVisionConfig(**size, image_size=16, patch_size=8)), -2
    )
    vit = VitSize(dim=16, layers=1, heads=2)
    stage = DualStage(codes=K, dim=W, depth=R, pixel_layers=[1], pixel_weights=[1.0], decoder=vit)
    tokenizer = DualToken(DualModel(stage, tower))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    export(model, hf_tokenizer, str(tmp_path / "tokenizer"), str(tmp_path / "export"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    ids = torch.tensor([TextEncoder(hf_tokenizer, model.vocabulary)("is it red?")])
    hidden = model.backbone(inputs_embeds=model.inputs_embeds(ids)).last_hidden_state
    torch.testing.assert_close(plain(ids).logits, model.lm.get_output_embeddings()(hidden))

    loaded = VisualModel.from_pretrained(str(tmp_path / "export"), device="cpu")
    prompt = TextEncoder(hf_tokenizer, model.vocabulary).caption_prompt("no")
    sampling = Sampling(cfg=3.0, temperature=0.0)
    drawn = loaded.draw_codes(["no"], temperature=0.0)
    assert torch.equal(drawn, draw_places(model, [prompt], tokens=T, sampling=sampling))
    (picture,) = loaded.generate(["no"], temperature=0.0)
    assert picture.size == (16, 16)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    codes = loaded.encode([image])
    assert codes.shape == (1, T, 2, R) and torch.equal(
        codes, loaded.visual_tokenizer.encode(codes_input(image))
    )
    expected = answer(model, hf_tokenizer, model.vocabulary, codes, ["is it red?"], 4)
    assert loaded.ask([image], ["is it red?"], max_new_tokens=4) == expected
    (tmp_path / "export" / "visual_heads.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="Export it again"):
        VisualModel.from_pretrained(str(tmp_path / "export"), device="cpu")


def codes_input(image: Any) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_the_heads_count_as_new_rows(made: tuple[DepthModel, Any]) -> None:
    model, _ = made
    parts = model.parts()
    assert {parts[id(p)] for p in model.heads.parameters()} == {"new_rows"}
    assert {parts[id(p)] for p in model.adapter.parameters()} == {"adapter"}


def test_what_does_not_fit_is_told(made: tuple[DepthModel, Any]) -> None:
    model, _ = made
    make, rng = builder(made), np.random.default_rng(0)
    with pytest.raises(
        VocabularyError, match=r"shape \(4, 2, 2\), but this model reads \(T, 2, 3\)"
    ):
        make.build("caption_to_image", {"codes": row(0)["codes"][..., :2]}, rng)
    with pytest.raises(VocabularyError, match="this model has 7 in each codebook"):
        make.build("caption_to_image", {"codes": row(0)["codes"] + K}, rng)
    ids = torch.tensor([[model.vocabulary.first_visual]])
    with pytest.raises(VocabularyError, match="1 visual places, but codes of 0"):
        model.inputs_embeds(ids)
    with pytest.raises(VocabularyError, match="one token for a place"):
        model.check_vectors(torch.zeros(K, W), model.vocabulary)
    with pytest.raises(ConfigError, match=r"depth_heads\.heads=5"):
        DepthModel(
            model.lm,
            model.adapter,
            model.code_vectors_VC,
            model.vocabulary,
            size=DepthHeads(heads=5),
            depth=R,
        )
