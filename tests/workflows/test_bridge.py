"""The stage `bridge`: its task on real shards, what is refused, its plan, and an export that draws
through it.

Covers: workflows/train/tasks/bridge.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from smalti import shards
from smalti.config import load_recipe
from smalti.errors import ConfigError, DataError
from smalti.mllm.bpe import train_bpe
from smalti.mllm.bridge import CODES, load_bridge
from smalti.mllm.build import build_unified, save_unified
from smalti.mllm.export import export
from smalti.mllm.inference import VisualModel
from smalti.schema import BridgeSection, EncoderTrain, LanguageModel, MllmSection, Train
from smalti.tokenizers.code_index import CodeIndex
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.siglip import build_siglip
from smalti.tokenizers.unicode2 import Unicode2
from smalti.workflows import bridge
from smalti.workflows.chain import run_recipe, stages_of
from smalti.workflows.smoke import _tiny_diffuser
from smalti.workflows.systems.registry import system_of
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.task import Context, Row
from smalti.workflows.train.tasks.bridge import BridgeTask

K, C, TOKENS = 20, 6, 16
CAPTIONS = ["a red circle", None, "a blue circle", "a green triangle"]
TRAIN = Train(steps=2, batch_size=2)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _tiny_diffuser(str(tmp_path_factory.mktemp("decoder") / "sd"))


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    """A shard of four images, one of them without a caption."""
    codes_BT = np.arange(4 * TOKENS, dtype=np.int32).reshape(4, TOKENS) % K
    schema = shards.token_schema((TOKENS,))
    columns = {"image_id": list("abcd"), "caption": CAPTIONS, "label": [None] * 4, "qa": [[]] * 4}
    arrays = {name: pa.array(column, schema.field(name).type) for name, column in columns.items()}
    arrays["codes"] = shards.list_column(codes_BT)
    shards.write_shard(
        str(tmp_path / "tokens"), "train/00000", pa.table([arrays[n] for n in schema.names], schema)
    )
    return str(tmp_path / "tokens")


@pytest.fixture
def task(tokens: str, decoder: str, tmp_path: Path) -> BridgeTask:
    """Set up on this process, with random code vectors."""
    (tmp_path / "bridge").mkdir()
    save_file(
        {"codes": torch.randn(K, C, generator=torch.Generator().manual_seed(0))},
        tmp_path / "bridge" / CODES,
    )
    section = BridgeSection(decoder=decoder, width=16, layers=1, heads=2, steps=2, train=TRAIN)
    keys, sizes = bridge.captioned(tokens)
    assert sizes == [3]
    made = BridgeTask(section, tokens, keys, sizes, TOKENS, str(tmp_path / "bridge"))
    made.setup(Context(torch.device("cpu"), Collectives(), 0, TRAIN))
    return made


def rows_of(task: BridgeTask) -> list[Row]:
    source = task.source()
    return [Row(n, 0, *source.read(0, n)[:1], n, source.read(0, n)[1]) for n in range(3)]


def test_a_batch_holds_the_vectors_of_an_images_codes_and_its_caption(task: BridgeTask) -> None:
    batch = task.make_batch(rows_of(task))
    for image, place in enumerate((0, 2, 3)):
        codes_T = (torch.arange(TOKENS) + place * TOKENS) % K
        assert torch.equal(batch["vectors"][image], task.codes_VC[codes_T])
    words = AutoTokenizer.from_pretrained(task.section.decoder, subfolder="tokenizer")
    assert "green triangle" in words.decode(batch["ids_text_encoder"][2])
    assert batch["ids_text_encoder"].shape == (3, 12)


def test_it_trains_and_is_saved_beside_its_codes(task: BridgeTask, tmp_path: Path) -> None:
    batch, model = task.make_batch(rows_of(task)), task.modules()["model"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss, metrics = task.loss("model", {"model": model}, batch, step, None) or (None, {})
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and float(metrics["retrieval"]) == 1.0
    task.save(str(tmp_path / "bridge"), {"model": model.state_dict()})
    loaded, codes_VC = load_bridge(str(tmp_path / "bridge"))
    assert torch.equal(loaded(batch["vectors"]).sequence, task.bridge(batch["vectors"]).sequence)
    assert torch.equal(codes_VC, task.codes_VC)


def test_the_codes_are_the_trained_ones(tmp_path: Path) -> None:
    model, hf_tokenizer = language_model()
    with torch.no_grad():
        model.adapter.codes.weight.add_(1)
    save_unified(str(tmp_path / "mllm" / "model"), model, hf_tokenizer)
    assert torch.equal(bridge.trained_codes(str(tmp_path / "mllm")), model.adapter.codes.weight)


class Codes:
    num_codes, code_shape, embed_splits = K, (), (C,)

    def code_vectors(self) -> torch.Tensor:
        return torch.randn(K, C, generator=torch.Generator().manual_seed(0))


def language_model(visual: object = None):
    size = LanguageModel(
        hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=32, text_vocab_size=290
    )
    hf_tokenizer = train_bpe(["a red circle"] * 3, 290)
    return build_unified(
        MllmSection(config=size, adapter="cascade"), hf_tokenizer, visual or Codes()
    ), hf_tokenizer


@pytest.fixture
def exported(task: BridgeTask, tmp_path: Path) -> str:
    """An export of a UniCode² whose bridge leads to the tiny decoder."""
    size = EncoderTrain(
        patch_size=8, hidden_size=C * 4, layers=1, heads=2, text_layers=1, text_length=6
    )
    build_siglip(size, 32, 40, 0, 1).save_pretrained(tmp_path / "siglip")
    visual = Unicode2(
        VisionEncoder.from_pretrained(str(tmp_path / "siglip")), CodeIndex(torch.randn(K, C * 4))
    )
    visual.save_pretrained(tmp_path / "visual")
    model, hf_tokenizer = language_model(visual)
    export(model, hf_tokenizer, str(tmp_path / "visual"), str(tmp_path / "export"))
    task.save(task.path, {"model": task.modules()["model"].state_dict()})
    bridge.copy_into(task.path, str(tmp_path / "export"))
    return str(tmp_path / "export")


def test_an_export_with_a_bridge_draws_where_diffusers_is_installed(exported: str) -> None:
    model = VisualModel.from_pretrained(exported, device="cpu")
    if find_spec("diffusers") is None:
        with pytest.raises(ConfigError, match="needs the package diffusers"):
            model.generate(["a red circle"])
        return
    drawn = model.generate(["a red circle", "a blue circle"], seed=3, batch_size=1)
    assert [picture.size for picture in drawn] == [(32, 32)] * 2
    again = model.generate(["a red circle", "a blue circle"], seed=3)
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in again]
    assert drawn[0].tobytes() != model.generate(["a red circle"], seed=4)[0].tobytes()


def test_tokens_without_captions_are_reported(
    tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smalti.workflows.train.tasks.mllm.caption_of", lambda row: "")
    with pytest.raises(DataError, match="has a caption"):
        bridge.captioned(tokens)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bridge.decoder=x"], "system=semhitok with mllm.adapter=dual"),
        (
            ["system=unicode2", "bridge.decoder=x", "mllm.adapter=single"],
            "system=unicode2, mllm.adapter=cascade",
        ),
        (
            [
                "system=unicode2",
                "bridge.decoder=x",
                "bridge.train.batch_size=5",
                "resources.workers=2",
            ],
            "bridge: train.batch_size=5",
        ),
    ],
)
def test_bridges_that_cannot_be_built_are_refused_before_the_first_stage(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    chain = ["mllm.config={}", "encoder.train={}", "corpus.source=generated:4", "tracking.uri=off"]
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        run_recipe(load_recipe(None, [*chain, *overrides, f"out={tmp_path}/out"]))
    assert not (tmp_path / "out").exists()


def test_it_is_a_stage_of_recipes_that_have_it_and_is_planned(
    decoder: str, task: BridgeTask
) -> None:
    own = [
        "system=unicode2",
        "encoder.train={patch_size: 8, hidden_size: 24}",
        "corpus.image_size=32",
    ]
    recipe = load_recipe(
        None, [*own, f"bridge={{decoder: {decoder}, width: 16, layers: 1, heads: 2}}"]
    )
    assert stages_of(recipe)[-3:] == ["bridge", "export", "evaluate"]
    assert "bridge" not in stages_of(load_recipe(None, own))
    planned = {model.name: model for model in system_of(recipe).planned_models(recipe)}["bridge"]
    wider = (24 - C) * 16  # of a feature in place of the code vectors here
    assert planned.parameters("model") == sum(p.numel() for p in task.bridge.parameters()) + wider
    assert planned.frozen == sum(t.numel() for t in [*task.text.parameters(), *task.text.buffers()])
