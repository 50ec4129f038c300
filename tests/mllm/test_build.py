"""Building from a recipe's section, and the folder on disk.

Covers: mllm/base_lm.py, mllm/visual_tokenizer.py.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from smalti.errors import ArtifactError, ConfigError, TrainingError
from smalti.mllm.base_lm import SMALL_HEAD_GAIN, load_language_model, load_text_tokenizer
from smalti.mllm.bpe import train_bpe
from smalti.mllm.build import build_unified, load_unified, save_unified
from smalti.schema import LanguageModel, MllmSection
from smalti.tokenizers.loading import load_tokenizer


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_builds_the_same_model_and_leaves_the_callers_randomness(
    visual_tokenizer_dir,
) -> None:
    visual = load_tokenizer(visual_tokenizer_dir)
    section = MllmSection(
        config=LanguageModel(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=32)
    )
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = build_unified(section, train_bpe([], 280), visual, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert same_state(one, build_unified(section, train_bpe([], 280), visual, seed=3))
    assert not same_state(one, build_unified(section, train_bpe([], 280), visual, seed=4))


@pytest.mark.parametrize("adapter", ["dual", "single", "cascade"])
def test_saved_and_loaded_model_is_the_same_to_the_bit(
    make_unified, tmp_path, adapter: str
) -> None:
    model, hf_tokenizer = make_unified(adapter=adapter, adapter_hidden=20, image_loss_weight=0.5)
    save_unified(str(tmp_path), model, hf_tokenizer)
    loaded, loaded_tokenizer = load_unified(str(tmp_path))
    assert same_state(model, loaded)
    assert torch.equal(model.code_vectors_VC, loaded.code_vectors_VC) or adapter == "cascade"
    assert loaded.vocabulary == model.vocabulary
    assert loaded.image_loss_weight == 0.5
    assert len(loaded_tokenizer) == len(hf_tokenizer)
    ids = torch.tensor([[5, model.vocabulary.boi, model.vocabulary.first_visual + 3]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model(batch)[0], loaded(batch)[0])


def test_weights_handed_in_are_what_is_saved(make_unified, tmp_path) -> None:
    model, hf_tokenizer = make_unified()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_unified(str(tmp_path), model, hf_tokenizer, state)
    loaded, _ = load_unified(str(tmp_path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    state.pop("lm.lm_head.weight")
    with pytest.raises(TrainingError, match="lm_head"):
        save_unified(str(tmp_path), model, hf_tokenizer, state)


def make_tiny_qwen2(*, tied: bool, vocab_size: int = 20, **more: object) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, **more,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def test_from_a_published_folder_with_padding_and_a_tied_head(
    tmp_path, visual_tokenizer_dir
) -> None:
    hf_tokenizer = train_bpe(["a blue circle"] * 3, 280)
    num_text = len(hf_tokenizer)
    published = make_tiny_qwen2(tied=True, vocab_size=num_text + 10, eos_token_id=[7, 8])
    published.save_pretrained(tmp_path)
    hf_tokenizer.chat_template = "{{ messages }}"
    hf_tokenizer.save_pretrained(tmp_path)
    loaded = load_text_tokenizer(str(tmp_path))
    model = build_unified(
        MllmSection(pretrained=str(tmp_path)), loaded, load_tokenizer(visual_tokenizer_dir)
    )
    head = model.lm.get_output_embeddings().weight
    assert torch.equal(head[:num_text], published.lm_head.weight[:num_text])
    assert len(head) == num_text + 4 + 24
    assert set(model.lm.generation_config.eos_token_id) == {7, 8, loaded.eos_token_id}
    assert loaded.chat_template == "{{ messages }}"


def test_a_torn_or_incomplete_language_model_is_reported(tmp_path) -> None:
    section = MllmSection(pretrained=str(tmp_path))
    make_tiny_qwen2(tied=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if "up_proj" not in k}, file, {"format": "pt"})
    with pytest.raises(
        ConfigError,
        match=r"lacks 1 weights of Qwen2ForCausalLM, the first model\.layers\.0\.mlp\.up_proj",
    ):
        load_language_model(section, None)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_language_model(section, None)


def test_sections_that_cannot_be_built(tmp_path, visual_tokenizer_dir) -> None:
    hf_tokenizer, visual = train_bpe([], 280), load_tokenizer(visual_tokenizer_dir)
    with pytest.raises(ConfigError, match="Neither"):
        build_unified(MllmSection(), hf_tokenizer, visual)
    with pytest.raises(ConfigError, match="both set"):
        build_unified(MllmSection(pretrained="x", config=LanguageModel()), hf_tokenizer, visual)
    with pytest.raises(ConfigError, match="multiple of heads"):
        build_unified(
            MllmSection(config=LanguageModel(hidden_size=30, heads=4)), hf_tokenizer, visual
        )
    with pytest.raises(ConfigError, match="could not be loaded"):
        build_unified(MllmSection(pretrained=str(tmp_path)), hf_tokenizer, visual)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_text_tokenizer(str(tmp_path))


def test_half_written_torn_or_foreign_folders_are_refused(make_unified, tmp_path) -> None:
    with pytest.raises(ArtifactError, match="smalti mllm"):
        load_unified(str(tmp_path))
    model, hf_tokenizer = make_unified()
    save_unified(str(tmp_path), model, hf_tokenizer)
    settings = tmp_path / "unified.json"
    good = settings.read_text()
    settings.write_text(json.dumps({"format": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        load_unified(str(tmp_path))
    settings.write_text(good)
    weights = tmp_path / "unified.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="torn"):
        load_unified(str(tmp_path))


def test_visual_rows_of_the_head_start_as_the_adapters_outputs(visual_tokenizer_dir: str) -> None:
    visual = load_tokenizer(visual_tokenizer_dir)
    size = LanguageModel(
        hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, text_vocab_size=290
    )
    model = build_unified(
        MllmSection(config=size, max_length=64), train_bpe([], 290), visual, seed=3
    )
    vocabulary, head = model.vocabulary, model.lm.get_output_embeddings().weight.detach()
    visual_rows = head[vocabulary.first_visual : vocabulary.size]
    outputs = model.adapter(model.code_vectors_VC).detach()
    rms = lambda x: float(x.detach().pow(2).mean().sqrt())  # noqa: E731
    ways = [torch.nn.functional.normalize(x, dim=-1) for x in (visual_rows, outputs)]
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-4)
    assert rms(outputs) == pytest.approx(
        rms(model.lm.get_input_embeddings().weight[: vocabulary.num_text]), rel=1e-3
    )
    assert rms(visual_rows) == pytest.approx(
        SMALL_HEAD_GAIN * rms(head[: vocabulary.num_text]), rel=1e-3
    )


def test_a_model_from_numbers_starts_by_repeating_the_code_it_was_given(
    visual_tokenizer_dir: str,
) -> None:
    visual = load_tokenizer(visual_tokenizer_dir)
    size = LanguageModel(
        hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, text_vocab_size=290
    )
    model = build_unified(
        MllmSection(config=size, max_length=64), train_bpe([], 290), visual, seed=3
    )
    ids = torch.arange(model.vocabulary.num_codes)[:, None] + model.vocabulary.first_visual
    with torch.no_grad():
        hidden = model.backbone(inputs_embeds=model.inputs_embeds(ids)).last_hidden_state[:, -1]
        logits = model.lm.get_output_embeddings()(hidden)
    assert (logits.argmax(-1) == ids[:, 0]).float().mean() > 0.9
