"""Features straight from a source: the encoder's, split by hash, bad images counted, and the same
after a break.

Covers: workflows/features/featurizer.py, workflows/sources/generated.py.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from smalti import images, shards
from smalti.artifact import RECORD, Artifact
from smalti.errors import DataError
from smalti.schema import EncoderTrain, Recipe
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.siglip import build_siglip
from smalti.workflows import encoder
from smalti.workflows.corpus.index import image_id
from smalti.workflows.corpus.layout import is_held_out
from smalti.workflows.features import from_source
from smalti.workflows.features import stage as features
from smalti.workflows.features.featurizer import choose_patches
from smalti.workflows.features.from_source import FeatureGroup
from smalti.workflows.sources import Sample, Unusable
from smalti.workflows.sources.generated import draw

GOOD, PATCHES = 11, 3


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's worker here, without Ray: what it makes is what is tested."""

    def here(items: Any, worker: Any, args: Any, resources: Any, **more: Any) -> Iterator[Any]:
        made = worker(*args)
        for item in items:
            yield made.work(made.read(item))

    monkeypatch.setattr(from_source, "run_shards", here)
    monkeypatch.setattr(from_source, "ensure_ray", lambda recipe: nullcontext())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eleven pictures, an empty file and a broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(GOOD):
        (folder / f"{index:02d}.png").write_bytes(draw(0, "x", index, 16)[0])
    (folder / "05a.png").write_bytes(b"")
    (folder / "05b.png").write_bytes(draw(0, "x", 99, 16)[0][:60])
    return folder


@pytest.fixture
def siglip(tmp_path: Path) -> str:
    torch.manual_seed(0)
    size = EncoderTrain(
        patch_size=8, hidden_size=16, layers=1, heads=2, text_layers=1, text_length=6
    )
    build_siglip(size, 16, 40, 0, 1).save_pretrained(tmp_path / "siglip")
    return str(tmp_path / "siglip")


def recipe(out: Path, source: Path, siglip: str) -> Recipe:
    wanted = Recipe.model_validate(
        {
            "out": str(out),
            "tracking": {"uri": "off"},
            "corpus": {"val_fraction": 0.4, "shard_images": 4},
            "encoder": {"pretrained": siglip},
            "features": {"source": str(source), "patches": PATCHES, "batch_size": 2},
        }
    )
    encoder.run(wanted)
    return wanted


def files(artifact: Artifact) -> dict[str, bytes]:
    root = Path(artifact.path)
    return {
        str(one.relative_to(root)): one.read_bytes()
        for one in root.rglob("*")
        if one.is_file() and one.name != RECORD
    }


def test_features_of_a_source_are_the_encoders_and_nothing_vanishes(
    source: Path, siglip: str, tmp_path: Path
) -> None:
    made, vision = (
        features.run(recipe(tmp_path / "out", source, siglip)),
        VisionEncoder.from_pretrained(siglip),
    )
    counts, found = made.counts, {}
    for split in shards.SPLITS:
        for key in shards.list_shards(made.path, split):
            table = shards.read_shard(made.path, key)
            assert table.num_rows <= 4 * PATCHES
            names = table.column("image_id").to_pylist()
            for row, (name, patch, vector) in enumerate(
                zip(names, table.column("patch").to_pylist(), shards.vectors(table), strict=True)
            ):
                assert names[row - row % PATCHES] == name
                found[name, patch] = (split, vector)
    assert counts["images"] == GOOD == len({name for name, _ in found})
    assert (counts["quarantined"], counts["found"]) == (2, GOOD + 2)
    assert counts["vectors"] == len(found) == GOOD * PATCHES == counts["train"] + counts["val"]
    assert counts["val"] > 0
    for index in range(GOOD):
        data = draw(0, "x", index, 16)[0]
        name = image_id(data)
        pixels = (
            torch.from_numpy(images.to_pixels(data, 16)).permute(2, 0, 1)[None].float() / 127.5 - 1
        )
        expected = vision(pixels)[0].detach().numpy()
        for patch in choose_patches(name, 0, PATCHES, 4):
            split, vector = found[name, int(patch)]
            assert split == ("val" if is_held_out(name, 0.4) else "train")
            np.testing.assert_allclose(vector, expected[patch], atol=2e-3)
    keys = shards.list_shards(made.path, "quarantine")
    lost = [row for key in keys for row in shards.read_shard(made.path, key).to_pylist()]
    assert [(row["key"], row["reason"]) for row in lost] == [
        ("05a.png", "empty"),
        ("05b.png", "truncated"),
    ]


def broken_off(wanted: Recipe, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage, interrupted at the first shard that has `part` in its key."""
    write = shards.write_shard

    def breaks_off(path: str, key: str, table: Any) -> Any:
        if part in key:
            raise KeyboardInterrupt
        return write(path, key, table)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            features.run(wanted)


def test_a_restart_makes_what_is_missing_and_ends_with_the_same_bytes(
    source: Path, siglip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = features.run(recipe(tmp_path / "whole", source, siglip))
    wanted = recipe(tmp_path / "torn", source, siglip)
    broken_off(wanted, "/00002-", monkeypatch)
    made = features.run(wanted)
    assert files(made) == files(whole)
    assert (made.counts, made.fingerprint) == (whole.counts, whole.fingerprint)


def write_tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            data = draw(0, "x", number, 16)[0]
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_pieces_of_a_group_that_was_killed_do_not_stay_beside_those_of_another(
    siglip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tar is another one at the next try, and gives fewer pieces."""
    source = tmp_path / "x.tar"
    write_tar(source, range(11))
    wanted = recipe(tmp_path / "out", source, siglip)
    broken_off(wanted, "-002", monkeypatch)
    write_tar(source, range(4))
    made = features.run(wanted)
    assert {key.partition("/")[2] for key in shards.list_shards(made.path)} == {"00000-000"}
    assert (
        sum(shards.shard_rows(made.path, key) for key in shards.list_shards(made.path))
        == made.counts["vectors"]
    )


def test_a_group_is_forgotten_by_its_whole_number(tmp_path: Path) -> None:
    for number in (0, 100_000):
        table = pa.Table.from_pylist([], shards.QUARANTINE)
        shards.write_shard(str(tmp_path), shards.shard_key("quarantine", number), table)
    worker = FeatureGroup(str(tmp_path), "", Recipe(out=str(tmp_path)), 16)
    worker.forget(100_000, [], str(tmp_path / "groups" / "100000.json"))
    assert shards.list_shards(str(tmp_path), "quarantine") == ["quarantine/00000"]


def test_shards_of_no_group_and_sources_without_images_are_refused(
    source: Path, siglip: str, tmp_path: Path
) -> None:
    wanted = recipe(tmp_path / "out", source, siglip)
    made = features.run(wanted)
    (Path(made.path) / RECORD).rename(Path(made.path) / "artifact.partial.json")
    key = shards.list_shards(made.path)[0]
    other = Path(shards.shard_path(made.path, "train/77777-000"))
    shutil.copy(shards.shard_path(made.path, key), other)
    with pytest.raises(DataError, match=r"1 shards that belong to no group.*77777"):
        features.run(wanted)
    other.unlink()
    assert features.run(wanted).counts == made.counts
    empty = tmp_path / "broken"
    empty.mkdir()
    (empty / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="has no image to train on"):
        features.run(recipe(tmp_path / "none", empty, siglip))


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"max_aspect": 2.0}, "aspect"),
        ({"max_bytes": 20}, "too_large"),
        ({"require_caption": True}, "no_caption"),
    ],
)
def test_the_filters_of_the_corpus_hold_for_a_source_too(
    section: dict[str, object], reason: str
) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (48, 16), "red").save(stream, "PNG")
    found = Sample("wide", (0, 0), stream.getvalue(), None, None, ())
    for given, wanted in ((section, reason), ({}, None)):
        worker = FeatureGroup("out", "encoder", Recipe.model_validate({"corpus": given}), 16)
        one = worker.decode(found)
        assert (one.reason if isinstance(one, Unusable) else None) == wanted
