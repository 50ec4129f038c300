"""The real tasks: two workers (and ZeRO-3, and bf16) against one, on tiny models.

All runs of a worker count share a group.

Covers: workflows/train/collectives.py, workflows/train/data.py, workflows/train/tasks/dual.py,
workflows/train/tasks/encoder.py, workflows/train/tasks/mllm.py, workflows/train/tasks/pixel.py,
workflows/train/tasks/reconstruction.py, workflows/train/tasks/semantic.py.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from smalti import shards
from smalti.schema import (
    DecoderStage,
    DepthHeads,
    DualStage,
    EncoderTrain,
    Gan,
    LanguageModel,
    Lora,
    Loss,
    Mixture,
    MllmSection,
    MllmStage,
    Perceptual,
    PixelStage,
    SemanticStage,
    TokenizerSection,
    Train,
    VitSize,
)
from smalti.workflows.train.task import Task
from smalti.workflows.train.tasks.dual import DualTask
from smalti.workflows.train.tasks.encoder import EncoderTask
from smalti.workflows.train.tasks.mllm import MllmTask
from smalti.workflows.train.tasks.pixel import PixelTask
from smalti.workflows.train.tasks.semantic import SemanticTask

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
SIZE, GRID, DIM, K, M = 16, (4, 4), 16, 6, 3
TRAIN = Train(steps=6, batch_size=8, lr=3e-3, warmup=1, log_every=2)
VIT = VitSize(dim=16, layers=1, heads=2)
SEMANTIC = SemanticStage(
    dim=5, decoder_dim=16, decoder_layers=1, decoder_heads=2, decay=0.8, train=TRAIN
)
PIXEL = PixelStage(
    codes=M, dim=4, encoder=VIT, decoder=VIT, init_steps=2, semantic_only_decoder=True
)
ENCODER = EncoderTrain(
    patch_size=4,
    hidden_size=DIM,
    layers=1,
    heads=2,
    text_layers=1,
    text_vocab_size=270,
    augment_shift=1,
    augment_flip=True,
)
DUAL = DualStage(
    codes=8,
    dim=4,
    depth=2,
    pixel_layers=[1],
    pixel_weights=[1.0],
    decoder=VIT,
    init_steps=2,
    decay=0.8,
)
LOSS = Loss(l1=0.2, gan=Gan(weight=0.1, start_step=3, channels=8, layers=1, lr=1e-3))
NAMES = ["encoder", "semantic", "pixel", "flat", "adaptive", "decoder", "dual", "mllm", "places"]
RESUMED = ["semantic", "pixel", "dual", "mllm-old"]
ZERO3 = ["encoder", "semantic", "pixel", "flat", "dual", "mllm", "places"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_data(root)
    return root


def make_data(root: Path) -> None:
    """A corpus of 21 images in three shards, and everything that the tasks read."""
    rng = np.random.default_rng(0)
    for index, count in enumerate((8, 6, 7)):
        write_images(root / "corpus", shards.shard_key("train", index), count, rng)
    write_images(root / "corpus", shards.shard_key("val", 0), 3, rng)
    make_models(root)


def write_images(corpus: Path, key: str, count: int, rng: np.random.Generator) -> None:
    def png() -> bytes:
        colour = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        data = io.BytesIO()
        Image.fromarray(colour).save(data, "png")
        return data.getvalue()

    rows = [
        {
            "image_id": f"{key}-{n}",
            "image": png(),
            "width": SIZE,
            "height": SIZE,
            "caption": None if n == 1 else f"a thing of kind {n % 3}",
            "label": None if n == 1 else f"kind {n % 3}",
            "source": "made",
            "qa": [{"question": "what kind?", "answer": str(n % 3)}] * (n % 3),
        }
        for n in range(count)
    ]
    shards.write_shard(str(corpus), key, pa.Table.from_pylist(rows, shards.CORPUS))


def make_models(root: Path) -> None:
    """Encoder, centroids, semantic and pixel weights, a whole tokenizer, token shards, text
    tokenizers.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from smalti.mllm.bpe import train_bpe
    from smalti.tokenizers.dualtoken import DualModel, DualToken
    from smalti.tokenizers.encoders import VisionEncoder
    from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok
    from smalti.tokenizers.siglip import build_siglip

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=275, tie_word_embeddings=True, **size, **heads)
    ).save_pretrained(root / "lm")
    torch.manual_seed(0)
    build_siglip(ENCODER, SIZE, 270, 0, 2).save_pretrained(root / "encoder")
    build_siglip(ENCODER.model_copy(update={"layers": 2}), SIZE, 270, 0, 2).save_pretrained(
        root / "tower"
    )
    torch.manual_seed(1)
    save_file({"centroids": torch.randn(K, DIM)}, root / "centroids.safetensors")
    encoder = VisionEncoder.from_pretrained(str(root / "encoder"))
    semantic = SemanticTokenizer(DIM, SEMANTIC, K, GRID)
    semantic.init_from(torch.randn(K, DIM))
    pixel = PixelTokenizer(PIXEL, semantic.codes, SIZE, GRID, K * M)
    save_file(semantic.state_dict(), root / "semantic.safetensors")
    save_file(pixel.state_dict(), root / "pixel.safetensors")
    SemHiTok(
        TokenizerSection(semantic=SEMANTIC, pixel=PIXEL), pixel, semantic, encoder
    ).save_pretrained(root / "tokenizer")
    for name in ("encode", "mllm"):
        train_bpe(["a thing of kind 0 1 2", "what kind?"] * 3, 270).save_pretrained(
            root / name / "text_tokenizer"
        )
    for index, count in enumerate((5, 4)):
        lines = pa.table({"text": [f"line {n} about nothing" for n in range(count)]})
        shards.write_shard(str(root / "mllm" / "text"), shards.shard_key("train", index), lines)
    write_tokens(root, "tokens", K * M, (16,))
    DualToken(
        DualModel(DUAL, VisionEncoder.from_pretrained(str(root / "tower"), -2))
    ).save_pretrained(root / "dual")
    write_tokens(root, "dual-tokens", DUAL.codes, (16, 2, DUAL.depth))


def write_tokens(root: Path, name: str, num_codes: int, shape: tuple[int, ...]) -> None:
    rng, schema = np.random.default_rng(1), shards.token_schema(shape)
    for key in shards.list_shards(str(root / "corpus")):
        table = shards.read_shard(str(root / "corpus"), key)
        columns = {name: table.column(name) for name in ("image_id", "caption", "label", "qa")}
        columns["codes"] = shards.list_column(
            rng.integers(0, num_codes, (table.num_rows, *shape), dtype=np.int32)
        )
        shards.write_shard(
            str(root / name), key, pa.table([columns[n] for n in schema.names], schema)
        )


def jobs(root: Path) -> dict[str, tuple[type[Task], dict, Train]]:
    """name → task, settings, training."""
    keys = shards.list_shards(str(root / "corpus"), "train")
    rows = {"keys": keys, "sizes": [8, 6, 7]}
    images = {
        "corpus": str(root / "corpus"),
        "image_size": SIZE,
        "max_pixels": 10**6,
        "layer": -1,
        **rows,
    }
    with_encoder = images | {"encoder": str(root / "encoder")}
    guided = (SEMANTIC, K, DIM, str(root / "semantic.safetensors"))
    pixel = {
        "stage": PIXEL,
        "loss": LOSS,
        "grid": GRID,
        "num_codes": K * M,
        "semantic": guided,
        **with_encoder,
    }
    perceptual = Loss(perceptual=Perceptual(kind="encoder", weight=0.5))
    flat_stage = PIXEL.model_copy(update={"semantic_only_decoder": False, "init_steps": 0})
    adaptive = LOSS.model_copy(
        update={"gan": LOSS.gan.model_copy(update={"adaptive": True, "start_step": 1})}
    )
    dual = {"stage": DUAL, "loss": LOSS, **images, "encoder": str(root / "tower"), "layer": -2}
    at_once = PIXEL.model_copy(update={"init_steps": 0})
    semantic = {"stage": SEMANTIC, "num_codes": K, "grid": GRID, "dim": DIM, **with_encoder}
    encoder = {k: v for k, v in images.items() if k != "layer"} | {"sizes": [7, 5, 6]}
    section = MllmSection(
        config=LanguageModel(
            hidden_size=16, layers=1, heads=2, kv_heads=2, intermediate_size=32, text_vocab_size=270
        ),
        mixture=Mixture(caption_to_image=1, image_to_caption=1, qa=1, text=1),
        max_length=64,
        loss_chunk=32,
        image_loss_weight=0.5,
    )
    texts = (shards.list_shards(str(root / "mllm" / "text")), [5, 4])
    tokens = {
        "text": texts,
        "tokenizer": str(root / "tokenizer"),
        "tokens": str(root / "tokens"),
        "path": str(root / "mllm"),
        **rows,
    }
    places = section.model_copy(update={"depth_heads": DepthHeads(layers=1, heads=2, mlp_ratio=1)})
    of_places = {"tokenizer": str(root / "dual"), "tokens": str(root / "dual-tokens")}
    return {
        "encoder": (
            EncoderTask,
            {"encoder": ENCODER, "path": str(root / "encode"), **encoder},
            TRAIN,
        ),
        "semantic": (
            SemanticTask,
            semantic | {"centroids": str(root / "centroids.safetensors")},
            TRAIN,
        ),
        "pixel": (PixelTask, pixel, TRAIN),
        "flat": (
            PixelTask,
            pixel | {"semantic": None, "stage": flat_stage, "loss": perceptual},
            TRAIN,
        ),
        "adaptive": (PixelTask, pixel | {"stage": at_once, "loss": adaptive}, TRAIN),
        "decoder": (
            PixelTask,
            pixel
            | {
                "decoder": DecoderStage(decoder=VIT).decoder,
                "start": str(root / "pixel.safetensors"),
            },
            TRAIN,
        ),
        "dual": (DualTask, dual, TRAIN),
        "mllm": (MllmTask, tokens | {"section": section}, TRAIN),
        "places": (MllmTask, tokens | of_places | {"section": places}, TRAIN),
    }


def break_off(loop, at: int) -> None:
    """Run until step `at` (from 0), with whatever checkpoints come before."""
    whole_step = loop._step

    def step(number: int, batches: list) -> None:
        if number == at:
            raise InterruptedError
        whole_step(number, batches)

    loop._step = step
    with suppress(InterruptedError):
        loop.run()
    loop.checkpoints.wait()
    loop.collectives.barrier()


def run_all(config) -> dict[str, float]:
    """In a worker: every job in turn; how far the ranks' weights and buffers are apart afterwards."""
    from smalti.workflows.train import engines
    from smalti.workflows.train.loop import Loop

    apart = {}
    for name, job in config["jobs"].items():
        engines.prepare_process(False, 1)
        if job.resumable:
            break_off(Loop(job), 4)
        loop = Loop(job)
        loop.run()
        worst = 0.0
        for engine in loop.engines.values():
            whole = engines.full_weights(engine, on_this_rank=True)
            for tensor in whole.values():
                worst = max(
                    worst, float((loop.collectives.broadcast(tensor) - tensor).abs().float().max())
                )
        apart[name] = float(loop.collectives.all_reduce(torch.tensor(worst)))
    return apart


def fit(
    root: Path, workers: int, wanted: dict[str, tuple[type[Task], dict, Train]], out: Path
) -> dict[str, float]:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from smalti.workflows.train.driver_channel import DriverChannel
    from smalti.workflows.train.job import TrainingJob

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    channel = ray.remote(num_cpus=0)(DriverChannel).remote()
    made = {}
    for name, (task, settings, train) in wanted.items():
        (out / name).mkdir(parents=True)
        resumed = name.endswith("-resumed")
        made[name] = TrainingJob(
            task, settings, train, 5, str(out / name), 1, 0, channel, resumable=resumed
        )
    trainer = TorchTrainer(
        run_all,
        train_loop_config={"jobs": made},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name="all", storage_path=str(out / "ray")),
    )
    apart = trainer.fit().return_value
    _, pictures, _, _ = ray.get(channel.take.remote())
    np.savez(out / "pictures.npz", *[picture for _, _, picture in pictures])
    return apart


@pytest.fixture(scope="module")
def results(on_ray, place, tmp_path_factory) -> dict[str, tuple[Path, dict[str, float]]]:
    """Folders of the runs: `one` (one worker), `two` (two), and in `two` variants under ZeRO and
    bf16.
    """
    plain = jobs(place)
    more = dict(plain)
    task, settings, train = plain["flat"]
    more["flat-muon"] = (task, settings, train.model_copy(update={"optimizer": "muon"}))
    for name in ZERO3:
        task, settings, train = plain[name]
        more[f"{name}-zero3"] = (task, settings, train.model_copy(update={"zero_stage": 3}))
    for name, stage in (("semantic", 0), ("pixel", 1), ("dual", 1), ("mllm", 3)):
        task, settings, train = plain[name]
        more[f"{name}-bf16"] = (
            task,
            settings,
            train.model_copy(update={"zero_stage": stage, "precision": "bf16"}),
        )
    task, settings, train = plain["adaptive"]
    more["adaptive-zero2"] = (task, settings, train.model_copy(update={"zero_stage": 2}))
    task, settings, train = plain["mllm"]
    more["mllm-micro"] = (task, settings, train.model_copy(update={"micro_batch_size": 1}))
    spared = {"activation_checkpointing": True, "offload": "cpu"}
    for name, stage in (("mllm", 3), ("pixel", 2)):
        task, settings, train = plain[name]
        more[f"{name}-spared"] = (
            task,
            settings,
            train.model_copy(update=spared | {"zero_stage": stage}),
        )
    task, settings, _ = plain["mllm"]
    section = settings["section"]
    old = settings | {"section": section.model_copy(update={"old_rows": 0.25})}
    base = {
        "pretrained": str(place / "lm"),
        "config": None,
        "lora": Lora(rank=2),
        "freeze": ["new_rows"],
    }
    pretrained = settings | {"section": section.model_copy(update=base)}
    plain |= {"mllm-old": (task, old, TRAIN), "mllm-lora": (task, pretrained, TRAIN)}
    more["mllm-lora"] = (task, pretrained, TRAIN.model_copy(update={"zero_stage": 3}))
    for name in RESUMED:
        task, settings, train = plain[name]
        if name == "mllm-old":
            settings = settings | {
                "section": settings["section"].model_copy(update={"packing": True})
            }
        more[f"{name}-resumed"] = (task, settings, train.model_copy(update={"checkpoint_every": 3}))
    folder = tmp_path_factory.mktemp("runs")
    return {
        "one": (folder / "one", fit(place, 1, plain, folder / "one")),
        "two": (folder / "two", fit(place, 2, more, folder / "two")),
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [f for f in folder.rglob("*.safetensors") if "text_tokenizer" not in f.parts]
    return load_file(file)


def distance(a: Path, b: Path) -> float:
    """Largest difference of a weight.

    Biases of attention keys are left out: softmax cancels them, their gradient is rounding noise,
    and Adam makes steps of full size out of it.
    """
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    names = [n for n in one if not n.endswith(("k_proj.bias", "in_proj_bias", "qkv.bias"))]
    return max(float((one[n].float() - other[n].float()).abs().max()) for n in names)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_come_to_what_one_does(results, name) -> None:
    assert distance(results["one"][0] / name, results["two"][0] / name) < 2e-5


@pytest.mark.parametrize("name", ZERO3)
def test_zero_3_comes_to_the_same_whole_weights(results, name) -> None:
    assert distance(results["one"][0] / name, results["two"][0] / f"{name}-zero3") < 2e-5


def test_every_pixel_phase_ends_with_a_picture_under_zero_3_too(results, place) -> None:
    """Three held-out images in a row each: input, rebuilt, and from semantic codes alone where
    there is guidance.
    """
    for folder, jobs_of in (
        (results["one"][0], NAMES),
        (results["two"][0], list(results["two"][1])),
    ):
        drawing = [
            name
            for name in jobs_of
            if name.startswith(("pixel", "flat", "adaptive", "decoder", "dual"))
        ]
        shapes = [picture.shape for picture in np.load(folder / "pictures.npz").values()]
        columns = [2 if name.startswith(("flat", "dual")) else 3 for name in drawing]
        assert sorted(shapes) == sorted(
            (3 * (SIZE + 2) - 2, n * (SIZE + 2) - 2, 3) for n in columns
        )
    one, two = (
        next(iter(np.load(results[n][0] / "pictures.npz").values())).astype(int)
        for n in ("one", "two")
    )
    assert np.abs(one - two).max() <= 1


def test_an_adaptive_gan_and_codebooks_from_the_first_step_come_to_the_same_under_zero_2(
    results,
) -> None:
    assert distance(results["one"][0] / "adaptive", results["two"][0] / "adaptive-zero2") < 2e-5
    weights = [row["gan_weight"] for row in history(results["one"][0] / "adaptive")]
    assert len(set(weights)) == len(weights) > 1, "it adapts"


def test_accumulation_of_unequal_token_counts_comes_to_the_same(results) -> None:
    assert distance(results["one"][0] / "mllm", results["two"][0] / "mllm-micro") < 2e-5


@pytest.mark.parametrize("name", ["mllm", "pixel"])
def test_offload_and_activations_computed_again_come_to_the_same(results, name) -> None:
    one, two = (
        history(results[n][0] / folder) for n, folder in (("one", name), ("two", f"{name}-spared"))
    )
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-5)
    assert distance(results["one"][0] / name, results["two"][0] / f"{name}-spared") < 2e-5


def test_packed_rows_on_two_workers_come_to_what_one_does_without(results) -> None:
    """Which samples a step holds does not depend on packing or on the number of workers, and
    neither does their loss.
    """
    one, two = (
        history(results[n][0] / name)
        for n, name in (("one", "mllm-old"), ("two", "mllm-old-resumed"))
    )
    assert [row["loss_image"] for row in two] == pytest.approx(
        [row["loss_image"] for row in one], abs=1e-5
    )


@pytest.mark.parametrize("name", RESUMED)
def test_a_task_that_is_broken_off_goes_on_to_the_same_curve_and_weights(results, name) -> None:
    """From step 3: an EMA codebook; k-means at step 2 and a GAN from step 3 on; packed rows whose
    text moves less.
    """
    one, two = results["one"][0] / name, results["two"][0] / f"{name}-resumed"
    assert distance(one, two) < 2e-5
    assert [row["loss"] for row in history(two)] == pytest.approx(
        [row["loss"] for row in history(one)], abs=1e-5
    )
    if name != "mllm-old":  # the same number of workers: to the last bit
        whole = results["two"][0] / name
        assert distance(whole, two) == 0
        for ours, theirs in zip(history(two), history(whole), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_low_rank_updates_of_a_published_model_come_to_the_same_under_zero_3(results) -> None:
    assert distance(*(results[n][0] / "mllm-lora" for n in ("one", "two"))) < 2e-5


def test_all_ranks_end_alike(results) -> None:
    """EMA codebooks, k-means starts and both engines of the GAN among them: bit for bit."""
    apart = results["two"][1]
    assert set(NAMES) < set(apart) and set(apart.values()) == {0.0}


@pytest.mark.parametrize("name", ["semantic-bf16", "pixel-bf16", "dual-bf16", "mllm-bf16"])
def test_bf16_stays_near_float32(results, name) -> None:
    """The same losses but for rounding, and whole weights in float32."""
    ours = history(results["two"][0] / name)
    plain = history(results["one"][0] / name.removesuffix("-bf16"))
    assert [row["loss"] for row in ours] != [row["loss"] for row in plain]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in plain], rel=0.02)
    assert all(
        t.dtype in (torch.float32, torch.int64) for t in tensors(results["two"][0] / name).values()
    )


def test_the_dual_phase_moves_the_tower_up_to_its_layer_and_what_it_learns_loads(
    results, place
) -> None:
    from smalti.tokenizers.dualtoken import DualModel, DualToken
    from smalti.tokenizers.encoders import VisionEncoder

    model = DualModel(DUAL, VisionEncoder.from_pretrained(str(place / "tower"), -2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(tensors(results["one"][0] / "dual"))
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    behind = ("encoder.tower.encoder.layers.1", "encoder.tower.post", "encoder.tower.head")
    assert not any(name.startswith(behind) for name in moved)
    assert {
        "pixel.book.codes",
        "semantic.book.codes",
        "encoder.tower.encoder.layers.0.mlp.fc1.weight",
    } < moved
    assert DualToken(model).encode(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 16, 2, 2)
    rows = history(results["one"][0] / "dual")
    assert {
        "codes_used",
        "semantic_codes_used",
        "restarted",
        "psnr",
        "semantic",
        "gan_weight",
    } <= set(rows[-1])
    assert 0 < rows[-1]["codes_used"] <= 1 and "codes_used" not in rows[0]


def test_the_semantic_codebook_and_encoder_are_untouched_by_the_pixel_phase(results, place) -> None:
    """The decoder phase leaves all but the decoder as it was, bit for bit; the pixel phase owns no
    semantic weight.
    """
    before, after = load_file(place / "pixel.safetensors"), tensors(results["one"][0] / "decoder")
    assert not any(
        name.startswith("semantic_codes") for name in tensors(results["one"][0] / "pixel")
    )
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert same != name.startswith("decoder.") or same, name
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("decoder."))


def test_a_stage_of_the_language_model_begins_at_its_step(place) -> None:
    """Kinds and weights of a batch are those of the stage that its step lies in; rows of no use to
    a stage still serve.
    """
    from smalti.mllm.sequences import questions_of
    from smalti.workflows.train.collectives import Collectives
    from smalti.workflows.train.task import Context, Row

    _, settings, train = jobs(place)["mllm"]
    later = MllmStage(
        from_step=2,
        mixture=Mixture(caption_to_image=0, image_to_caption=0, qa=1),
        answer_loss_weight=7,
    )
    section = settings["section"].model_copy(
        update={
            "mixture": Mixture(caption_to_image=1, image_to_caption=0, qa=0),
            "stages": [later],
            "train": train,
        }
    )
    task = MllmTask(**settings | {"section": section, "text": None})
    task.setup(Context(torch.device("cpu"), Collectives(), 5, train))
    source = task.source()
    assert sum(source.sizes) == 21

    def batch(step: int) -> dict[str, torch.Tensor]:
        first = step * train.batch_size
        read = [source.read(0, n) for n in range(train.batch_size)]
        return task.make_batch(
            [Row(first + n, 0, key, n, values) for n, (key, values) in enumerate(read)]
        )

    with_questions = sum(bool(questions_of(source.read(0, n)[1])) for n in range(train.batch_size))
    assert 0 < with_questions < train.batch_size
    for step, asked, weight in (
        (0, 0, 1.0),
        (1, 0, 1.0),
        (2, with_questions, 7.0),
        (9, with_questions, 7.0),
    ):
        made = batch(step)
        starts = made["input_ids"] == task.model.vocabulary.und_start
        assert int(starts.sum()) == asked, step
        assert (
            float(made["answer_loss_weight"]) == weight and float(made["image_loss_weight"]) == 0.5
        )
    early, late = batch(1), batch(2)
    late_plain = {name: value for name, value in late.items() if not name.endswith("_loss_weight")}
    assert task.totals(late) > task.totals(late_plain) and task.totals(early) == task.totals(
        dict(early)
    )


def test_texts_come_by_their_share_and_are_read_as_images_are(place, tmp_path) -> None:
    from smalti.workflows.train.batch_loader import BatchLoader
    from smalti.workflows.train.collectives import Collectives
    from smalti.workflows.train.task import Context
    from smalti.workflows.train.tasks.mllm import MllmTask

    _, settings, train = jobs(place)["mllm"]
    train = train.model_copy(update={"data_window": 1, "data_gb": 0.5})
    only_images = Mixture(caption_to_image=1, image_to_caption=0, qa=0, text=0)
    stages = {"mixture": only_images.model_copy(update={"text": 1 / 3}), "train": train}
    stages["stages"] = [MllmStage(from_step=4, mixture=only_images)]
    task = MllmTask(**settings | {"section": settings["section"].model_copy(update=stages)})
    task.setup(Context(torch.device("cpu"), Collectives(), 5, train))
    source = task.source()
    source.configure(train, print)
    assert [part.window_bytes for part in source.sources] == [5e8, 5e8]
    order = task.order(source)
    assert order.texts.window == order.rows.window == 1
    feed = BatchLoader(source, order, task.make_batch, batch_size=8, micro=8, rank=0, world_size=1)
    images = [
        int((b["input_ids"] == task.model.vocabulary.boi).sum()) for _, (b,) in feed.steps(0, 6)
    ]
    assert images == [6, 6, 6, 6, 8, 8]
    texts = [source.read(3, n)[1]["text"] for n in range(5)] + [
        source.read(4, n)[1]["text"] for n in range(4)
    ]
    assert all(text.startswith("line ") for text in texts)


@pytest.mark.parametrize("vq", ["ema", "vanilla", "norm"])
def test_the_use_of_every_kind_of_semantic_codebook_is_counted(place, vq) -> None:
    from smalti.workflows.train.collectives import Collectives
    from smalti.workflows.train.task import Context, Row
    from smalti.workflows.train.tasks.semantic import SemanticTask

    _, settings, train = jobs(place)["semantic"]
    task = SemanticTask(**settings | {"stage": SEMANTIC.model_copy(update={"vq": vq})})
    task.setup(Context(torch.device("cpu"), Collectives(), 5, train))
    source, model = task.source(), task.tokenizer
    rows = [Row(n, 0, key, n, values) for n in range(2) for key, values in [source.read(0, n)]]
    batches = [task.make_batch([row]) for row in rows]
    used = set()
    for batch in batches:
        task.loss("model", {"model": model}, batch, 0, None)
        used |= set(model.ids.flatten().tolist())
    for expected in (len(used) / K, 0.0):
        assert float(task.after_step(0, {"model": model})["codes_used"]) == expected


def test_the_results_load_as_what_they_are(results) -> None:
    from transformers import AutoTokenizer, SiglipModel

    from smalti.mllm.build import load_unified

    folder, _ = results["two"]
    SiglipModel.from_pretrained(folder / "encoder-zero3" / "model")
    AutoTokenizer.from_pretrained(folder / "encoder" / "model")
    model, _ = load_unified(str(folder / "mllm-zero3" / "model"))
    assert model.vocabulary.num_codes == K * M
    model, _ = load_unified(str(folder / "places-zero3" / "model"))
    assert model.num_codes == DUAL.codes and model.depth == DUAL.depth
    rows = history(folder / "places")
    for row in rows:
        assert row["loss_image"] == pytest.approx(
            row["loss_pixel"] + row["loss_semantic"], rel=1e-5
        )
    assert rows[-1]["loss_image"] < rows[0]["loss_image"]


def test_low_rank_updates_end_as_plain_weights_beside_rows_that_never_moved(results, place) -> None:
    from smalti.mllm.build import load_unified

    model, _ = load_unified(str(results["two"][0] / "mllm-lora" / "model"))
    found, base = model.state_dict(), load_file(place / "lm" / "model.safetensors")
    assert {name.removeprefix("lm.") for name in found if not name.startswith("adapter")} == {
        *base,
        "lm_head.weight",
    }
    rows, before = found["lm.model.embed_tokens.weight"], base["model.embed_tokens.weight"]
    assert torch.equal(rows[: model.vocabulary.num_text], before[: model.vocabulary.num_text])
    assert not torch.equal(
        found["lm.model.layers.0.self_attn.q_proj.weight"],
        base["model.layers.0.self_attn.q_proj.weight"],
    )
    losses = [row["loss"] for row in history(results["two"][0] / "mllm-lora")]
    assert losses[-1] < losses[0]
