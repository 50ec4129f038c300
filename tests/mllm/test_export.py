"""The embedding swap: the same logits without the adapter, in a process that cannot import this
project.

Covers: mllm/visual_side.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from smalti.errors import VocabularyError
from smalti.mllm.build import build_unified
from smalti.mllm.export import export, swapped_rows
from smalti.mllm.generation import draw
from smalti.mllm.prompts import TextEncoder
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import LanguageModel, MllmSection, Sampling
from smalti.tokenizers.loading import load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

ELSEWHERE = """
import json, sys
sys.modules["smalti"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
torch.set_num_threads(1)
lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
assert not any(name.startswith("smalti.") for name in sys.modules)
ids = tokenizer("<bos>a blue circle<start_of_image><IMG_0><IMG_23><IMG_7><end_of_image>", return_tensors="pt").input_ids
with torch.no_grad():
    logits = lm(ids).logits
    ends = lm.generate(ids, max_new_tokens=3, do_sample=False)
torch.save({"ids": ids, "logits": logits, "generated": ends, "dtype": str(lm.dtype)}, out)
"""


@pytest.fixture
def exported(make_unified, visual_tokenizer_dir, tmp_path):
    model, hf_tokenizer = make_unified()
    folder = str(tmp_path / "export")
    counts = export(model, hf_tokenizer, visual_tokenizer_dir, folder, chunk=5)
    return model, hf_tokenizer, folder, counts


def logits_with_adapter(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.lm(inputs_embeds=model.inputs_embeds(ids)).logits


@pytest.mark.slow
def test_the_export_gives_the_same_logits_where_smalti_cannot_be_imported(
    exported, tmp_path
) -> None:
    model, _, folder, _ = exported
    out = tmp_path / "out.pt"
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, folder, str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(out)
    v = model.vocabulary
    assert found["ids"][0, -5:].tolist() == [
        v.boi,
        v.first_visual,
        v.first_visual + 23,
        v.first_visual + 7,
        v.eoi,
    ]
    torch.testing.assert_close(
        found["logits"], logits_with_adapter(model, found["ids"]), rtol=0, atol=1e-4
    )
    assert found["generated"].shape[1] > found["ids"].shape[1]


def test_rows_are_text_rows_then_adapter_outputs_whatever_the_chunk(make_unified) -> None:
    model, _ = make_unified()
    rows = swapped_rows(model, torch.float32, chunk=7)
    first = model.vocabulary.first_visual
    assert torch.equal(rows[:first], model.lm.get_input_embeddings().weight)
    torch.testing.assert_close(rows[first:], model.adapter(model.code_vectors_VC))
    torch.testing.assert_close(rows, swapped_rows(model, torch.float32, chunk=1000))


def test_every_visual_id_gives_the_same_logits(exported) -> None:
    model, _, folder, counts = exported
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(model.vocabulary.size)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            lm(ids).logits, logits_with_adapter(model, ids), rtol=0, atol=1e-4
        )
    assert counts["codes"] == 24
    assert counts["parameters"] == sum(p.numel() for p in lm.parameters())
    assert lm.config.tie_word_embeddings is False
    assert lm.generation_config.eos_token_id == [model.vocabulary.eos]
    assert lm.generation_config.pad_token_id == model.vocabulary.pad


def test_the_unified_model_is_left_as_it_was(make_unified, visual_tokenizer_dir, tmp_path) -> None:
    model, hf_tokenizer = make_unified()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, hf_tokenizer, visual_tokenizer_dir, str(tmp_path), "bf16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm.get_input_embeddings().num_embeddings == model.vocabulary.first_visual


def test_drawing_from_the_export_equals_drawing_from_the_unified_model(exported) -> None:
    model, _, folder, _ = exported
    lm, hf_tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    vocabulary = VisualVocabulary.from_tokenizer(hf_tokenizer)
    assert vocabulary == model.vocabulary
    text = TextEncoder(hf_tokenizer, vocabulary)
    prompts = [text.caption_prompt(prompt) for prompt in ("a blue circle", "a red square")]
    drawn = [
        draw(m, vocabulary, prompts, tokens=16, sampling=Sampling(cfg=2.0), seed=4)
        for m in (model, lm)
    ]
    assert torch.equal(*drawn)


def test_bf16_is_written_and_loaded_as_such(make_unified, visual_tokenizer_dir, tmp_path) -> None:
    model, hf_tokenizer = make_unified()
    export(model, hf_tokenizer, visual_tokenizer_dir, str(tmp_path), "bf16")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert lm.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    rows = lm.get_input_embeddings().weight
    assert torch.equal(rows, swapped_rows(model, torch.float32).bfloat16())


def test_settings_and_chat_template_travel_along(
    make_unified, visual_tokenizer_dir, tmp_path
) -> None:
    model, hf_tokenizer = make_unified()
    hf_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    export(model, hf_tokenizer, visual_tokenizer_dir, str(tmp_path))
    settings = json.loads((tmp_path / "smalti.json").read_text())
    assert (settings["tokens"], settings["grid"], settings["num_codes"]) == (16, [4, 4], 24)
    assert settings["first_visual"] == model.vocabulary.first_visual
    assert settings["system"] == "semhitok"
    chat = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        chat.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    )


def test_another_visual_tokenizer_is_refused(
    tiny, make_unified, visual_tokenizer_dir, tmp_path
) -> None:
    model, hf_tokenizer = make_unified()
    object.__setattr__(model.vocabulary, "num_codes", 25)
    with pytest.raises(VocabularyError, match="24 codes, but this model was trained with 25"):
        export(model, hf_tokenizer, visual_tokenizer_dir, str(tmp_path))


def test_a_tokenizer_that_would_load_as_another_is_refused(visual_tokenizer_dir, tmp_path) -> None:
    """A word-level tokenizer beside a Qwen2 model: transformers would load it with Qwen2's
    byte-level split.
    """
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "blue": 4, "circle": 5}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    hf_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    size = LanguageModel(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=32)
    model = build_unified(
        MllmSection(config=size), hf_tokenizer, load_tokenizer(visual_tokenizer_dir)
    )
    with pytest.raises(VocabularyError, match="loads as"):
        export(model, hf_tokenizer, visual_tokenizer_dir, str(tmp_path))
