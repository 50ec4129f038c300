"""Corpus, features, codebook and tokens on a real Ray: the same bytes for any number of actors, and
after SIGKILL.

Covers: workflows/cluster/session.py, workflows/encoder.py, workflows/pipeline/pixels.py,
workflows/tokens.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from smalti import shards
from smalti.artifact import RECORD, Artifact
from smalti.config import with_overrides
from smalti.errors import ConfigError, DataError
from smalti.schema import EncoderTrain, PixelStage, Recipe, SemanticStage, TokenizerSection, VitSize
from smalti.tokenizers.codebook import load_centroids
from smalti.workflows import encoder, tokens
from smalti.workflows.codebook import stage as codebook
from smalti.workflows.corpus import scan
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.features import stage as features
from smalti.workflows.features.featurizer import Featurizer, choose_patches
from smalti.workflows.pipeline import shards as shard_pipeline
from smalti.workflows.pipeline.stage import StageRun, find_artifact, run_stage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("on_ray_with_gpu")]

IMAGES, SHARD, GRID, DIM = 120, 4, 4, 24
CHILD = """
import importlib, sys
from smalti.schema import Recipe
from smalti.workflows.chain import MODULES
importlib.import_module(MODULES[sys.argv[1]]).run(Recipe.model_validate_json(sys.argv[2]))
"""


def recipe(out: Path, siglip: str = "", **sections: Any) -> Recipe:
    given: dict[str, Any] = {
        "out": str(out),
        "tracking": {"uri": "off"},
        "corpus": {
            "source": f"generated:{IMAGES}",
            "image_size": 32,
            "shard_images": SHARD,
            "val_fraction": 0.2,
        },
        "encoder": {"pretrained": siglip or None},
        "codebook": {"size": 20, "coarse": 4, "iterations": 4, "polish": 1},
    }
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values if isinstance(values, dict) else values
    return Recipe.model_validate(given)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random SigLIP: 32 px, patch 8, width 24."""
    from smalti.tokenizers.siglip import build_siglip

    torch.manual_seed(7)
    settings = EncoderTrain(
        patch_size=8, hidden_size=DIM, layers=2, heads=2, text_layers=1, text_length=6
    )
    path = tmp_path_factory.mktemp("siglip")
    build_siglip(settings, 32, vocab_size=40, pad_token_id=0, eos_token_id=1).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def base(on_ray_with_gpu: None, tmp_path_factory: pytest.TempPathFactory, siglip: str) -> Path:
    """A whole run's folder with corpus, encoder, features of all patches, and a tokenizer with
    random weights.
    """
    out = tmp_path_factory.mktemp("base")
    wanted = recipe(out, siglip)
    corpus.run(wanted)
    encoder.run(wanted)
    features.run(wanted)
    run_stage(wanted, "tokenizer", "tokenizer", {}, {}, save_tokenizer)
    tokens.run(wanted)
    return out


def save_tokenizer(run: StageRun) -> dict[str, int]:
    from smalti.tokenizers.encoders import VisionEncoder
    from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok

    torch.manual_seed(3)
    tiny = VitSize(dim=16, layers=1, heads=2, mlp_ratio=2)
    semantic = SemanticStage(dim=6, decoder_dim=16, decoder_heads=2, decoder_layers=1)
    section = TokenizerSection(
        semantic=semantic, pixel=PixelStage(codes=3, dim=4, encoder=tiny, decoder=tiny)
    )
    vision = VisionEncoder.from_pretrained(str(run.recipe.encoder.pretrained))
    meaning = SemanticTokenizer(vision.dim, section.semantic, 10, vision.grid)
    pixel = PixelTokenizer(section.pixel, meaning.codes, 32, vision.grid)
    SemHiTok(section, pixel, meaning, vision).save_pretrained(run.path)
    return {}


def files(folder: str | Path) -> dict[str, bytes]:
    """Every file of an artifact but its record, which holds times."""
    root = Path(folder)
    found = sorted(path for path in root.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def beside(base: Path, out: Path, siglip: str, **sections: Any) -> Recipe:
    """A recipe in another folder that shares what the base has: only what differs is made."""
    return recipe(out, siglip, share=[str(base)], **sections)


def kill_in_the_middle(process: Any, watched: Path) -> None:
    """SIGKILL a stage as soon as a shard is in `watched`."""
    deadline = time.monotonic() + 200
    while not list(watched.glob("*.parquet")):
        assert process.poll() is None, process.text()
        assert time.monotonic() < deadline, "no shard came"
        time.sleep(0.002)
    process.kill()
    assert not (watched.parent / RECORD).exists(), "it was killed after the end"
    time.sleep(2.0)  # its actors end with it


@pytest.fixture
def begin(start: Any) -> Callable[[str, Recipe], Any]:
    """`begin(stage, recipe)`: the stage in a process of its own, a driver of this Ray."""
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = os.environ | {"RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    return lambda stage, wanted: start(["-c", CHILD, stage, wanted.model_dump_json()], environment)


# ---- the same bytes, whatever happens ------------------------------------------------------------


def test_duplicates_sorted_out_on_ray_come_to_the_same(
    base: Path, tmp_path: Path, siglip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large corpora do it; small ones are sorted out in the driver."""
    monkeypatch.setattr(scan, "INLINE_ROWS", -1)
    corpus.run(recipe(tmp_path, siglip))
    assert files(tmp_path / "corpus") == files(base / "corpus")


def test_corpus_killed_and_started_again_with_more_readers_is_byte_equal(
    base: Path, begin: Any, tmp_path: Path
) -> None:
    wanted = recipe(tmp_path, resources={"readers": 2})
    kill_in_the_middle(begin("corpus", wanted), tmp_path / "corpus" / "train")
    made, whole = corpus.run(wanted), Artifact.load(str(base / "corpus"))
    assert files(made.path) == files(whole.path)
    assert (made.counts, made.fingerprint) == (whole.counts, whole.fingerprint)


@pytest.mark.parametrize(("stage", "module"), [("features", features), ("tokens", tokens)])
def test_a_shard_stage_killed_and_started_again_is_byte_equal(
    base: Path, siglip: str, begin: Any, tmp_path: Path, stage: str, module: Any
) -> None:
    wanted = recipe(tmp_path, siglip, resources={"actors": 2})
    for name in ("corpus", "encoder", "tokenizer"):
        (tmp_path / name).symlink_to(base / name)
    kill_in_the_middle(begin(stage, wanted), tmp_path / stage / "train")
    made, whole = module.run(wanted), Artifact.load(str(base / stage))
    assert files(made.path) == files(whole.path)
    assert (made.counts, made.fingerprint) == (whole.counts, whole.fingerprint)


@pytest.mark.parametrize(
    ("stage", "module", "large"), [("features", features, False), ("tokens", tokens, True)]
)
def test_the_layout_for_gpus_gives_the_same_bytes(
    base: Path,
    siglip: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    module: Any,
    large: bool,
) -> None:
    """Readers ahead of the actors that hold the (logical) GPUs; and, where a shard is too large for
    that, without them.
    """
    if large:
        monkeypatch.setattr(shard_pipeline, "BLOCK_BYTES", 1)
    resources = {"actors": 2, "readers": 2, "gpus_per_worker": 0.5, "device": "cpu"}
    wanted = recipe(tmp_path, siglip, resources=resources)
    for name in ("corpus", "encoder", "tokenizer"):
        (tmp_path / name).symlink_to(base / name)
    made = module.run(wanted)
    assert files(made.path) == files(base / stage)
    assert made.scores["seconds/read"] > 0 and made.scores["seconds/model"] > 0


# ---- features ------------------------------------------------------------------------------------


def test_features_are_the_encoders_and_samples_are_among_them(
    base: Path, siglip: str, tmp_path: Path
) -> None:
    from smalti import images
    from smalti.tokenizers.encoders import VisionEncoder

    vision, key = VisionEncoder.from_pretrained(siglip), "train/00001"
    source = shards.read_shard(str(base / "corpus"), key)
    pixels = np.stack([images.to_pixels(data.as_py(), 32) for data in source.column("image")])
    expected = vision(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    table = shards.read_shard(str(base / "features"), key)
    found = shards.vectors(table).reshape(SHARD, GRID * GRID, DIM)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)
    assert table.column("patch").to_pylist() == list(range(GRID * GRID)) * SHARD
    assert (
        table.column("image_id").to_pylist()[:: GRID * GRID]
        == source.column("image_id").to_pylist()
    )
    counts = Artifact.load(str(base / "features")).counts
    assert counts["vectors"] == IMAGES * GRID * GRID == counts["train"] + counts["val"]

    wanted = beside(base, tmp_path, siglip, features={"patches": 5})
    for stage in (corpus, encoder):
        stage.run(wanted)
    sampled = shards.read_shard(features.run(wanted).path, key)
    assert sampled.num_rows == SHARD * 5
    chosen = np.array(sampled.column("patch")).reshape(SHARD, 5)
    assert len({tuple(row) for row in chosen.tolist()}) > 1, "each image has its own patches"
    for row, one in enumerate(source.column("image_id").to_pylist()):
        assert (chosen[row] == choose_patches(one, 0, 5, GRID * GRID)).all()
        np.testing.assert_array_equal(
            shards.vectors(sampled).reshape(SHARD, 5, DIM)[row], found[row, chosen[row]]
        )


def test_features_refuse_what_cannot_be(base: Path, siglip: str, tmp_path: Path) -> None:
    wanted = beside(base, tmp_path, siglip, features={"patches": 17})
    for stage in (corpus, encoder):
        stage.run(wanted)
    with pytest.raises(ConfigError, match=r"features\.patches=17, but .* gives 16 patches"):
        features.run(wanted)
    worker = Featurizer(siglip, wanted)
    with pytest.raises(
        DataError, match=r"some/file: image second has features that are NaN.* 1 of the 2 images"
    ):
        worker.check(np.array([[[1.0]], [[np.inf]]], np.float16), ["first", "second"], "some/file")


# ---- tokens --------------------------------------------------------------------------------------


def test_tokens_are_the_tokenizers_and_the_text_rides_along(base: Path) -> None:
    from smalti import images
    from smalti.tokenizers.loading import load_tokenizer

    tokenizer, key = load_tokenizer(str(base / "tokenizer")), "val/00001"
    source, made = (
        shards.read_shard(str(base / "corpus"), key),
        shards.read_shard(str(base / "tokens"), key),
    )
    pixels = np.stack([images.to_pixels(data.as_py(), 32) for data in source.column("image")])
    expected = tokenizer.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    np.testing.assert_array_equal(shards.codes(made), expected.numpy())
    for name in tokens.CARRIED:
        assert made.column(name).to_pylist() == source.column(name).to_pylist()
    assert shards.list_shards(str(base / "tokens")) == shards.list_shards(str(base / "corpus"))
    assert Artifact.load(str(base / "tokens")).counts["num_codes"] == 30


def test_tokens_in_bf16(base: Path, tmp_path: Path) -> None:
    places, key = [str(tmp_path), str(base / "corpus"), str(base / "tokenizer")], "val/00001"
    worker = tokens.EncodeShard(*places, recipe(tmp_path, tokens={"precision": "bf16"}), 32)
    worker.work(worker.read(key))
    found, wanted = (
        shards.codes(shards.read_shard(str(place), key)) for place in (tmp_path, base / "tokens")
    )
    assert (found == wanted).mean() > 0.9


# ---- codebook ------------------------------------------------------------------------------------


def train_vectors(path: str, split: str = "train") -> torch.Tensor:
    parts = [
        shards.vectors(shards.read_shard(path, key)) for key in shards.list_shards(path, split)
    ]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def shared(base: Path, out: Path, siglip: str, **sections: Any) -> Recipe:
    wanted = beside(base, out, siglip, **sections)
    for stage in (corpus, encoder, features):
        stage.run(wanted)
    return wanted


def test_codebook_is_the_same_for_any_number_of_workers(
    base: Path, siglip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smalti.workflows.codebook import passes

    monkeypatch.setattr(passes, "CHUNK_VECTORS", 300)  # several chunks of this small corpus
    made = []
    for workers in (1, 2):
        wanted = shared(base, tmp_path / str(workers), siglip, resources={"actors": workers})
        made.append(codebook.run(wanted))
    assert files(made[0].path) == files(made[1].path)
    assert made[0].scores == made[1].scores
    codes = load_centroids(made[0].path)
    assert codes.shape == (20, DIM)
    assert codes.dtype == torch.float32
    assert len(torch.unique(codes, dim=0)) == 20
    tree = load_file(Path(made[0].path) / "tree.safetensors")
    assert tree["cells"].shape == (4, DIM)
    assert tree["cell_of"].tolist() == sorted(tree["cell_of"].tolist())
    assert not (Path(made[0].path) / "work").exists()


def test_flat_codebook_scores_are_those_of_a_plain_search(
    base: Path, siglip: str, tmp_path: Path
) -> None:
    wanted = shared(
        base, tmp_path, siglip, codebook={"size": 12, "coarse": 1, "iterations": 6, "polish": 0}
    )
    made = codebook.run(wanted)
    codes, path = load_centroids(made.path), find_artifact(wanted, "features").path
    for split in ("train", "val"):
        vectors = train_vectors(path, split)
        distances = torch.cdist(vectors.double(), codes.double()).square()
        best = distances.min(1)
        counts = torch.bincount(best.indices, minlength=12)
        share = counts[counts > 0].double() / len(vectors)
        assert made.scores[f"distortion/{split}"] == pytest.approx(
            float(best.values.mean()), rel=1e-4
        )
        assert made.scores[f"entropy/{split}"] == pytest.approx(
            float(-(share * share.log()).sum()), rel=1e-6
        )
        assert made.scores[f"usage/{split}"] == pytest.approx(float((counts > 0).double().mean()))
        assert made.scores[f"vectors/{split}"] == len(vectors)
        assert made.scores[f"imbalance/{split}"] == pytest.approx(
            float(12 * (counts / len(vectors)).square().sum())
        )
        assert load_file(Path(made.path) / "counts.safetensors")[split].tolist() == counts.tolist()
    assert Image.open(Path(made.path) / "sizes.png").size == (640, 320)
    spread = float((vectors - vectors.mean(0)).square().sum(-1).mean())
    assert made.scores["distortion/val"] < 0.8 * spread


def test_planted_clusters_are_found_and_too_few_distinct_vectors_are_told(tmp_path: Path) -> None:
    """Eight points, each many times over: eight codes are those points; nine cannot be."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(8, 6)).astype(np.float16) * 3

    def plant(run: StageRun) -> dict[str, int]:
        for split, number in (("train", 0), ("train", 1), ("val", 0)):
            which = rng.permutation(np.repeat(np.arange(8), 25))
            arrays = [["x"] * 200, list(range(200)), shards.list_column(points[which])]
            import pyarrow as pa

            shards.write_shard(
                run.path,
                shards.shard_key(split, number),
                pa.table(arrays, shards.feature_schema(6)),
            )
        return {"vectors": 600}

    for coarse in (1, 3):
        out = tmp_path / f"found{coarse}"
        wanted = recipe(out, codebook={"size": 8, "coarse": coarse, "iterations": 8})
        run_stage(wanted, "features", "features", {}, {}, plant)
        made = codebook.run(wanted)
        codes = load_centroids(made.path).numpy()
        assert {tuple(row) for row in codes.tolist()} == {
            tuple(row) for row in points.astype(np.float32).tolist()
        }
        assert made.scores["distortion/val"] == pytest.approx(0, abs=1e-4)
        assert made.scores["usage/val"] == 1
        wanted = recipe(
            tmp_path / f"few{coarse}", codebook={"size": 9, "coarse": coarse, "iterations": 2}
        )
        run_stage(wanted, "features", "features", {}, {}, plant)
        with pytest.raises(
            DataError, match=r"codebook.size=9, but the features hold only 8 distinct vectors"
        ):
            codebook.run(wanted)
        mended = with_overrides(wanted, {"codebook.size": 8})
        assert codebook.run(mended).counts["codes"] == 8, (
            "the size that the error names works in the same place"
        )


def test_a_tokenizer_has_as_many_codes_as_the_codebook_that_lost_some(
    base: Path, siglip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from smalti.tracking import NullTracker
    from smalti.workflows.systems.semhitok import SemHiTokPhases
    from smalti.workflows.train.collectives import Collectives
    from smalti.workflows.train.task import Context
    from smalti.workflows.train.tasks.semantic import SemanticTask

    sections: dict[str, Any] = {
        "codebook": {"size": 20},
        "tokenizer": {"semantic": {"decoder_heads": 2, "dim": 8}},
    }
    wanted = shared(base, tmp_path, siglip, **sections)

    def seventeen(run: StageRun) -> dict[str, int]:
        save_file({"centroids": torch.randn(17, DIM)}, Path(run.path) / "centroids.safetensors")
        return {"codes": 17, "dropped": 3}

    run_stage(wanted, "codebook", "codebook", {}, {}, seventeen)
    parents = {name: find_artifact(wanted, name) for name in ("corpus", "encoder", "codebook")}
    phases = SemHiTokPhases(StageRun("tokenizer", "", wanted, NullTracker(), False, ""), parents)
    monkeypatch.setattr(SemHiTokPhases, "phase", lambda self, name, task, settings, *rest: settings)
    settings = phases.semantic()
    task = SemanticTask(**settings)
    task.setup(Context(torch.device("cpu"), Collectives(), 0, wanted.tokenizer.semantic.train))
    assert task.tokenizer.num_codes == 17
    assert phases.num_codes == 17 * wanted.tokenizer.pixel.codes


def test_an_equal_split_gives_every_cell_as_many_codes(
    base: Path, siglip: str, tmp_path: Path
) -> None:
    made = codebook.run(
        shared(base, tmp_path, siglip, codebook={"split": "equal", "iterations": 2, "polish": 0})
    )
    assert made.counts["replaced"] == 0
    assert torch.bincount(load_file(Path(made.path) / "tree.safetensors")["cell_of"]).tolist() == [
        5,
        5,
        5,
        5,
    ]


def test_codebook_sizes_that_cannot_be(base: Path, siglip: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"codebook\.coarse=30 cells for codebook\.size=20"):
        codebook.run(shared(base, tmp_path / "a", siglip, codebook={"coarse": 30}))
    with pytest.raises(DataError, match=r"holds only \d+ training vectors"):
        codebook.run(shared(base, tmp_path / "b", siglip, codebook={"size": 100_000}))


@pytest.mark.parametrize("coarse", [1, 4])
def test_codebook_broken_off_at_any_step_goes_on_to_the_same_bytes(
    base: Path, siglip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coarse: int
) -> None:
    from smalti.workflows.codebook import passes

    section = {"codebook": {"coarse": coarse, "iterations": 2, "polish": 2}}
    whole = codebook.run(shared(base, tmp_path / "whole", siglip, **section))
    wanted = shared(base, tmp_path / "torn", siglip, **section)
    real, calls, breaks = passes.in_order, [0], 0

    def breaks_off(*args: Any, **more: Any) -> Iterator[Any]:
        calls[0] += 1
        if calls[0] > 2:
            calls[0] = 0
            raise KeyboardInterrupt
        yield from real(*args, **more)

    monkeypatch.setattr(passes, "in_order", breaks_off)
    for _ in range(20):
        try:
            made = codebook.run(wanted)
            break
        except KeyboardInterrupt:
            breaks += 1
    assert breaks >= 1
    assert files(made.path) == files(whole.path)
    assert made.scores == whole.scores
