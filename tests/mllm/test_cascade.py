"""The cascade: a second codebook that begins as the frozen one, is trained where codes occur, and
ends in embedding rows.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from smalti.errors import ConfigError
from smalti.mllm import adapters
from smalti.mllm.adapters import CascadeAdapter, SingleAdapter
from smalti.mllm.bpe import train_bpe
from smalti.mllm.build import build_unified
from smalti.mllm.export import export, export_language_model
from smalti.mllm.inference import VisualModel
from smalti.mllm.model import UnifiedModel
from smalti.schema import LanguageModel, MllmSection
from smalti.tokenizers.code_index import CodeIndex
from smalti.tokenizers.loading import load_tokenizer
from smalti.tokenizers.unicode2 import Unicode2

K, C = 30, 10
SIZE = LanguageModel(
    hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, text_vocab_size=290
)


class Codes:
    """The language model's view of a UniCode²: vectors of one part, far from the origin."""

    num_codes = K
    code_shape = ()
    embed_splits = (C,)

    def code_vectors(self) -> torch.Tensor:
        return 3 + 5 * torch.randn(K, C, generator=torch.Generator().manual_seed(0))


def build(adapter: str = "cascade"):
    hf_tokenizer = train_bpe(["a blue circle", "is it red?"] * 3, 290)
    section = MllmSection(config=SIZE, max_length=64, adapter=adapter)
    return build_unified(section, hf_tokenizer, Codes(), seed=3), hf_tokenizer


def batch_of(model: UnifiedModel, codes: list[list[int]]) -> dict[str, torch.Tensor]:
    v = model.vocabulary
    ids = torch.tensor(
        [[v.boi, *(v.first_visual + code for code in row), v.eoi, 40] for row in codes]
    )
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_the_second_codebook_begins_as_the_first() -> None:
    """So the model begins as one on the frozen codebook with the same weights."""
    model, _ = build()
    adapter, vectors_VC = model.adapter, Codes().code_vectors()
    assert isinstance(adapter, CascadeAdapter) and adapter.codes.weight.shape == (K, C)
    back = adapter.codes.weight @ adapter.whiten_CC.inverse() + adapter.shift_C
    torch.testing.assert_close(back, vectors_VC, rtol=1e-4, atol=1e-4)
    frozen = SingleAdapter(adapter.splits, adapter.hidden, adapter.out)
    frozen.load_state_dict(
        {name: t for name, t in adapter.state_dict().items() if name != "codes.weight"}
    )
    torch.testing.assert_close(adapter(torch.arange(K)), frozen(vectors_VC))
    torch.testing.assert_close(
        torch.cov(adapter.codes.weight.T, correction=0), torch.eye(C), atol=0.01, rtol=0
    )


def test_it_is_held_once_and_is_part_of_the_adapter() -> None:
    model, _ = build()
    assert model.code_vectors_VC.numel() == 0
    assert model.parts()[id(model.adapter.codes.weight)] == "adapter"
    frozen, _ = build("single")
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in frozen.parameters())
    assert more == K * C


def test_codes_that_do_not_occur_do_not_move() -> None:
    model, _ = build()
    before = model.adapter.codes.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for codes in ([[1, 2, 3]], [[3, 4, 5]], [[1, 1, 1]]):
        optimizer.zero_grad()
        model(batch_of(model, codes))[0].backward()
        optimizer.step()
    moved = (model.adapter.codes.weight != before).any(1)
    assert moved.nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_two_half_batches_give_the_gradient_of_one() -> None:
    rows = [[1, 2, 3], [3, 4, 5], [6, 7, 1], [9, 9, 9]]
    grads = []
    for parts in ([rows], [rows[:2], rows[2:]]):
        model, _ = build()
        share = model.loss_weight(batch_of(model, rows)) / len(parts)
        for part in parts:
            (model(batch_of(model, part) | {"loss_weight": share})[0] / len(parts)).backward()
        grads.append(model.adapter.codes.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)
    assert grads[0].abs().sum(1).nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 9]


def test_a_batch_without_images_gives_it_a_gradient_of_zero() -> None:
    """Not none: every rank of a parallel run does the same."""
    model, _ = build()
    ids = torch.tensor([[40, 41, 42]])
    model({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})[0].backward()
    assert not model.adapter.codes.weight.grad.any()


def test_the_export_is_a_plain_model_with_the_trained_rows(tmp_path) -> None:
    model, hf_tokenizer = build()
    with torch.no_grad():
        model.adapter.codes.weight.add_(torch.randn(K, C))  # as after training
    export_language_model(model, hf_tokenizer, str(tmp_path), torch.float32, chunk=7)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rows = lm.get_input_embeddings().weight[model.vocabulary.first_visual :][:K]
    torch.testing.assert_close(rows, model.adapter.whole(model.adapter.codes.weight))
    ids = batch_of(model, [[0, 29, 7]])["input_ids"]
    with torch.no_grad():
        expected = model.lm(inputs_embeds=model.inputs_embeds(ids)).logits
        torch.testing.assert_close(lm(ids).logits, expected, rtol=0, atol=1e-4)


def test_an_exported_unicode2_answers_and_says_that_it_cannot_draw(
    visual_tokenizer_dir, tmp_path
) -> None:
    encoder = load_tokenizer(visual_tokenizer_dir).encoder
    Unicode2(encoder, CodeIndex(torch.randn(K, encoder.dim))).save_pretrained(tmp_path / "visual")
    hf_tokenizer = train_bpe(["a blue circle"] * 3, 290)
    section = MllmSection(config=SIZE, max_length=64, adapter="cascade")
    model = build_unified(section, hf_tokenizer, load_tokenizer(tmp_path / "visual"))
    export(model, hf_tokenizer, str(tmp_path / "visual"), str(tmp_path / "export"))
    exported = VisualModel.from_pretrained(str(tmp_path / "export"), device="cpu")
    picture = Image.new("RGB", (40, 50), (255, 0, 0))
    assert len(exported.ask([picture], ["what is it?"], max_new_tokens=3)) == 1
    assert exported.draw_codes(["a blue circle"]).shape == (1, 16)
    with pytest.raises(ConfigError, match="no pixel decoder"):
        exported.generate(["a blue circle"])


def test_a_large_codebooks_moments_are_those_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapters._moments(Codes().code_vectors())
    monkeypatch.setattr(adapters, "FIT_NUMBERS", 10)
    monkeypatch.setattr(adapters, "FIT_ROWS", 7)
    torch.testing.assert_close(adapters._moments(Codes().code_vectors()), whole)
