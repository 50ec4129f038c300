"""The exported model in use, from a folder that can be moved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from smalti.errors import ArtifactError, VocabularyError
from smalti.mllm.export import export
from smalti.mllm.generation import answer
from smalti.mllm.inference import VisualModel


@pytest.fixture
def folder(make_unified, visual_tokenizer_dir, tmp_path) -> str:
    model, hf_tokenizer = make_unified()
    export(model, hf_tokenizer, visual_tokenizer_dir, str(tmp_path / "made"))
    shutil.move(tmp_path / "made", tmp_path / "moved")
    return str(tmp_path / "moved")


def pictures() -> list[Image.Image]:
    colours = [(255, 0, 0), (0, 200, 30), (10, 10, 250)]
    return [Image.new("RGB", (40 + 10 * i, 50), colour) for i, colour in enumerate(colours)]


def test_text_to_pictures_whatever_the_batch(folder: str) -> None:
    model = VisualModel.from_pretrained(folder, device="cpu")
    prompts = ["a blue circle", "a red square", ""]
    whole = model.draw_codes(prompts, seed=5)
    assert whole.shape == (3, 16)
    assert torch.equal(model.draw_codes(prompts, seed=5, batch_size=1), whole)
    assert torch.equal(model.draw_codes(prompts, seed=5, batch_size=2), whole)
    assert not torch.equal(model.draw_codes(prompts, seed=6), whole)
    images = model.generate(prompts, seed=5, batch_size=2)
    with pytest.raises(torch._dynamo.exc.InvalidBackend, match="no-such"):
        model.generate(prompts[:1], compile="no-such")  # it reaches torch.compile
    assert [image.size for image in images] == [(32, 32)] * 3
    decoded = (
        model.visual_tokenizer.decode(whole[:1])[0].add(1).mul(127.5).round().clamp(0, 255).byte()
    )
    assert bytes(decoded.permute(1, 2, 0).flatten().tolist()) == images[0].tobytes()
    assert model.generate([]) == []


def test_pictures_and_questions_to_answers(folder: str) -> None:
    model = VisualModel.from_pretrained(folder, device="cpu")
    questions = ["what shape is it?", "is it red?", "why?"]
    codes = model.encode(pictures())
    assert codes.shape == (3, 16)
    expected = [
        answer(model.lm, model.hf_tokenizer, model.vocabulary, codes[i : i + 1], [question], 6)[0]
        for i, question in enumerate(questions)
    ]
    assert model.ask(pictures(), questions, max_new_tokens=6) == expected
    assert model.ask_codes(codes, questions, max_new_tokens=6, batch_size=2) == expected
    assert model.ask([], []) == []


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_pictures_of_any_mode_are_read(folder: str, mode: str) -> None:
    model = VisualModel.from_pretrained(folder, device="cpu")
    picture = Image.new("I;16", (40, 50), 30_000) if mode == "I;16" else pictures()[0].convert(mode)
    assert model.encode([picture]).shape == (1, 16)


def test_one_question_for_each_picture(folder: str) -> None:
    model = VisualModel.from_pretrained(folder, device="cpu")
    with pytest.raises(VocabularyError, match="3 images but 1 questions"):
        model.ask(pictures(), ["why?"])


def test_folders_that_are_no_export(folder: str, tmp_path) -> None:
    with pytest.raises(ArtifactError, match=r"smalti\.json"):
        VisualModel.from_pretrained(str(tmp_path))
    file = tmp_path / "moved" / "smalti.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_codes": 9}))
    with pytest.raises(VocabularyError, match="mixed from two exports"):
        VisualModel.from_pretrained(folder)


def test_torn_and_incomplete_weights_are_told(folder: str, tmp_path) -> None:
    file = tmp_path / "moved" / "model.safetensors"
    whole = load_file(file)
    save_file(
        {name: tensor for name, tensor in whole.items() if name != "lm_head.weight"},
        file,
        {"format": "pt"},
    )
    with pytest.raises(
        ArtifactError, match=r"lacks 1 weights of its language model, the first lm_head\.weight"
    ):
        VisualModel.from_pretrained(folder)
    for torn in (file.read_bytes()[:100], b""):
        file.write_bytes(torn)
        with pytest.raises(ArtifactError, match="no complete language model"):
            VisualModel.from_pretrained(folder)
    file.unlink()
    with pytest.raises(ArtifactError, match="no complete language model"):
        VisualModel.from_pretrained(folder)
