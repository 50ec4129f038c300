"""The corpus stage: what comes in is kept once or lies in quarantine with its reason, whoever is
killed on the way.

Covers: workflows/corpus/scan.py, workflows/corpus/write.py, workflows/sources/parquet.py.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalti import shards, storage
from smalti.artifact import RECORD, Artifact
from smalti.errors import DataError
from smalti.schema import Recipe
from smalti.workflows.corpus import index as corpus_index
from smalti.workflows.corpus import layout as corpus_layout
from smalti.workflows.corpus import scan
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.corpus import write as corpus_write
from smalti.workflows.sources.parquet import ParquetGroup
from smalti.workflows.sources.webdataset import TarGroup


def recipe(out: Path, source: Any, **section: Any) -> Recipe:
    readers = section.pop("readers", 1)
    return Recipe.model_validate(
        {
            "out": str(out),
            "tracking": {"uri": "off"},
            "resources": {"readers": readers},
            "corpus": {"source": source, **section},
        }
    )


def picture(number: int, size: int = 24, kind: str = "PNG", **more: Any) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind, **more)
    return stream.getvalue()


def rows(artifact: Artifact, split: str) -> list[dict[str, Any]]:
    return [
        row
        for key in shards.list_shards(artifact.path, split)
        for row in shards.read_shard(artifact.path, key).to_pylist()
    ]


def files(folder: str | Path) -> dict[str, bytes]:
    """Every file of an artifact but its record, which holds times."""
    root = Path(folder)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def huge_png() -> bytes:
    """A PNG of a few hundred bytes that claims 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def broken(folder: Path) -> dict[str, str]:
    """Writes ten kinds of broken image; name → the reason that it must get."""
    jpeg, png = picture(1, 64, "JPEG"), picture(2, 64)
    flipped = bytearray(png)
    flipped[20] ^= 0xFF  # a size that its checksum does not fit
    kinds = {
        "empty.png": (b"", "empty"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "text.jpg": (b"<html>404 not found</html>", "undecodable"),
        "zeros.jpg": (bytes(4096), "undecodable"),
        "header.jpg": (jpeg[:20], None),
        "flipped.png": (bytes(flipped), None),
        "bomb.png": (huge_png(), "bomb"),
        "tiny.png": (picture(3, 4), "too_small"),
        "cut.webp": ((webp := picture(4, 64, "WEBP"))[: len(webp) // 2], None),
    }
    for name, (data, _) in kinds.items():
        (folder / name).write_bytes(data)
    return {name: reason or "undecodable|truncated" for name, (_, reason) in kinds.items()}


def test_ten_kinds_of_broken_image_end_in_quarantine_and_the_sum_holds(
    inline: None, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    wanted = broken(source)
    for number in range(12):
        (source / f"good{number}.png").write_bytes(picture(100 + number))
    (source / "again.png").write_bytes(picture(100))
    made = corpus.run(recipe(tmp_path / "out", str(source), val_fraction=0.0, shard_images=5))
    lost = [
        row
        for key in shards.list_shards(made.path, "quarantine")
        for row in shards.read_shard(made.path, key).to_pylist()
    ]
    reasons = {row["key"]: row["reason"] for row in lost}
    duplicates = {key for key, reason in reasons.items() if reason == "duplicate"}
    assert len(duplicates) == 1
    assert duplicates <= {"again.png", "good0.png"}
    for name, reason in wanted.items():
        assert reasons[name] in reason.split("|"), name
    assert len(reasons) == 11
    assert all(row["detail"] and row["source"] == str(source) for row in lost)
    counts = made.counts
    assert (counts["images"], counts["quarantined"], counts["found"]) == (12, 11, 23)
    assert sum(count for name, count in counts.items() if name.startswith("quarantined/")) == 11
    kept = rows(made, "train")
    assert [
        len(shards.read_shard(made.path, key)) for key in shards.list_shards(made.path, "train")
    ] == [5, 5, 2]
    for row in kept:
        assert (row["width"], row["height"]) == (24, 24)
        assert row["image_id"] == corpus_index.image_id(row["image"])
        assert row["image"] == Path(row["source"].replace("::", "/")).read_bytes(), (
            "encoded bytes are unchanged"
        )


def test_nothing_usable_is_an_error_that_lists_the_reasons(inline: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"")
    (tmp_path / "in" / "x.jpg").write_bytes(b"hello there")
    with pytest.raises(DataError, match=r"0 usable images of 4 .*3 empty, 1 undecodable"):
        corpus.run(recipe(tmp_path / "out", str(tmp_path / "in")))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="0 usable images of 0"):
        corpus.run(recipe(tmp_path / "out2", str(tmp_path / "none")))


def test_the_split_is_a_function_of_the_image(inline: None, tmp_path: Path) -> None:
    made = corpus.run(recipe(tmp_path, "generated:50", image_size=16, val_fraction=0.3))
    held_out = {row["image_id"] for row in rows(made, "val")}
    assert 5 <= len(held_out) <= 25
    everything = held_out | {row["image_id"] for row in rows(made, "train")}
    assert held_out == {one for one in everything if corpus_layout.is_held_out(one, 0.3)}
    assert len(everything) == 50


def test_an_image_of_the_published_test_split_is_never_trained_on(
    inline: None, tmp_path: Path
) -> None:
    for name, numbers in (("train", range(8)), ("test", range(6, 10))):
        (tmp_path / name).mkdir()
        for number in numbers:
            (tmp_path / name / f"{number}.png").write_bytes(picture(number))
    made = corpus.run(
        recipe(tmp_path / "out", str(tmp_path / "train"), val_source=str(tmp_path / "test"))
    )
    assert (made.counts["train"], made.counts["val"], made.counts["quarantined/duplicate"]) == (
        6,
        4,
        2,
    )
    assert not {row["image_id"] for row in rows(made, "train")} & {
        row["image_id"] for row in rows(made, "val")
    }


def test_limit_counts_what_is_left_out(
    inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"image_size": 16, "shard_images": 5, "limit": 12}
    made = corpus.run(
        recipe(tmp_path / "a", "generated:100", val_source="generated:40:val", **settings)
    )
    assert (made.counts["train"], made.counts["val"], made.counts["found"]) == (12, 12, 24)
    split = corpus.run(recipe(tmp_path / "b", "generated:100", val_fraction=0.5, **settings))
    assert (split.counts["train"], split.counts["val"]) == (12, 12)
    assert split.counts["over_limit"] == split.counts["found"] - 24
    reversed_run = scan.run_shards
    monkeypatch.setattr(
        scan, "run_shards", lambda items, *rest, **more: reversed_run(items[::-1], *rest, **more)
    )
    again = corpus.run(recipe(tmp_path / "c", "generated:100", val_fraction=0.5, **settings))
    assert files(again.path) == files(split.path), (
        "the order in which groups are looked at does not show"
    )


@pytest.mark.parametrize("kind", ["parquet", "tar.gz"])
def test_a_file_that_is_read_in_order_is_opened_once_a_split(
    inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One row group, or a compressed tar, of many shards: not read up to its place again for each
    of them.
    """
    data = [picture(number) for number in range(40)]
    path, opened = tmp_path / f"x.{kind}", Counter[str]()
    if kind == "parquet":
        pq.write_table(pa.table({"image": data}), path)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for number, one in enumerate(data):
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(one)
                tar.addfile(info, io.BytesIO(one))
    group = ParquetGroup if kind == "parquet" else TarGroup
    reader = group.reader

    def counted(self: Any) -> Any:
        opened[self.source] += 1
        return reader(self)

    monkeypatch.setattr(group, "reader", counted)
    made = corpus.run(recipe(tmp_path / "out", str(path), val_fraction=0.3, shard_images=4))
    assert len(shards.list_shards(made.path)) >= 10
    assert opened == {str(path): 2}
    kept = {split: [row["image"] for row in rows(made, split)] for split in shards.SPLITS}
    assert sorted(kept["train"] + kept["val"]) == sorted(data)
    assert all(found == [one for one in data if one in found] for found in kept.values()), (
        "in the order of the file"
    )


def test_the_slowest_part_is_named_and_what_was_kept_is_counted(
    inline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = recipe(tmp_path, "generated:20", image_size=16, val_fraction=0.0, shard_images=5)
    write, written = shards.write_shard, []

    def breaks_off(path: str, key: str, table: Any) -> shards.Receipt:
        if key == "train/00002":
            raise KeyboardInterrupt
        written.append(key)
        return write(path, key, table)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            corpus.run(wanted)
    (tmp_path / "corpus" / "train" / ".00002.parquet.abc.smalti-tmp").write_bytes(b"half")
    made = corpus.run(wanted)
    assert not list(tmp_path.rglob("*.smalti-tmp")), "of the dead run"
    assert made.scores["retried/kept"] == 6, "four indexes and two shards"
    assert {"seconds/list", "seconds/read", "seconds/match", "seconds/write"} <= made.scores.keys()
    said = capsys.readouterr().err
    assert "is the slowest part" in said and "6 shards or groups kept from an earlier run" in said
    assert "images 20" in said and "unusable 0" in said


def test_a_shard_that_is_not_of_the_corpus_is_refused(
    inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left by hand: the next stage would read it."""
    wanted = recipe(
        tmp_path, "generated:8", image_size=16, val_fraction=0.0, shard_images=4, limit=6
    )
    real = corpus.check_and_plan

    def plants(run: Any, *rest: Any) -> Any:
        shards.write_shard(run.path, "train/00007", pa.table({"a": [1]}))
        return real(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "check_and_plan", plants)
        with pytest.raises(DataError, match=r"1 shards that .*train/00007\.parquet"):
            corpus.run(wanted)
    folder = tmp_path / "corpus" / "train"
    assert [one.name for one in folder.iterdir()] == ["00007.parquet"], (
        "reported before the shards are written"
    )
    (folder / "00007.parquet").rename(folder / "00000.parquet")
    made = corpus.run(wanted)
    assert shards.read_shard(made.path, "train/00000").schema.equals(shards.CORPUS), (
        "one of no images is recomputed"
    )


def test_images_without_a_caption_are_counted(inline: None, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "2.txt").write_text("two")
    made = corpus.run(recipe(tmp_path / "out", str(tmp_path), val_fraction=0.0, format="folder"))
    assert (made.counts["train"], made.counts["without_caption"]) == (4, 3)


def test_text_rides_along(inline: None, tmp_path: Path) -> None:
    made = corpus.run(recipe(tmp_path, "generated:6", image_size=16, val_fraction=0.0))
    for row in rows(made, "train"):
        assert row["caption"] == f"a {row['label']}"
        assert {"question", "answer"} == set(row["qa"][0])
    table = shards.read_shard(made.path, "train/00000")
    assert table.schema.equals(shards.CORPUS)
    assert isinstance(table.column("qa").type, pa.ListType)


def test_a_source_that_changes_between_two_tries_starts_over(inline: None, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "bad.png").write_bytes(b"x")
    wanted = recipe(tmp_path / "out", str(source), val_fraction=0.0)
    with pytest.raises(DataError, match="0 usable images of 1"):
        corpus.run(wanted)
    (source / "good.png").write_bytes(picture(1))
    made = corpus.run(wanted)
    assert (made.counts["train"], made.counts["quarantined"]) == (1, 1)


def test_names_and_texts_that_are_no_unicode_do_not_stop_the_run(
    inline: None, tmp_path: Path
) -> None:
    """File names of another encoding on disk, and halves of surrogate pairs in JSON."""
    source = tmp_path / "in"
    source.mkdir()
    with open(os.fsencode(source) + b"/caf\xe9.png", "wb") as file:
        file.write(picture(1))
    (source / "ok.png").write_bytes(picture(2))
    (source / "metadata.jsonl").write_text('{"file_name": "ok.png", "text": "\\ud83d"}')
    made = corpus.run(recipe(tmp_path / "out", str(source), val_fraction=0.0))
    found = {row["source"].rpartition("::")[2]: row["caption"] for row in rows(made, "train")}
    assert found == {"caf?.png": None, "ok.png": "?"}


@pytest.mark.parametrize("gone", [False, True])
def test_an_image_that_changes_between_the_passes_is_told_and_the_next_try_mends_it(
    inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.png").write_bytes(picture(number))
    wanted = recipe(tmp_path / "out", str(source), val_fraction=0.0, shard_images=2)
    written = corpus_write.WriteShards.shard

    def shard(self: corpus_write.WriteShards, key: str, *parts: Any) -> Any:
        if key == "train/00001":
            path = Path(
                source,
                shards.read_shard(self.path, "index/train/00001", ["key"]).column("key")[0].as_py(),
            )
            path.unlink() if gone else path.write_bytes(picture(99))
        return written(self, key, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_write.WriteShards, "shard", shard)
        with pytest.raises(DataError, match=r"has changed while the corpus was created"):
            corpus.run(wanted)
    made = corpus.run(wanted)
    assert made.counts["found"] == (5 if gone else 6)
    assert all(
        Path(row["source"].replace("::", "/")).read_bytes() == row["image"]
        for row in rows(made, "train")
    )


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "parquet", "arrow"])
def test_a_file_that_is_replaced_between_the_passes_is_told(
    inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By one that is shorter, or none of its kind: what its reader raises is no bug."""
    path = tmp_path / f"x.{kind}"

    def write(count: int) -> None:
        if kind == "parquet":
            pq.write_table(pa.table({"image": [picture(number) for number in range(count)]}), path)
        elif kind == "arrow":
            table = pa.table({"image": [picture(number) for number in range(count)]})
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        else:
            with tarfile.open(path, "w:" + kind.partition(".")[2]) as tar:
                for number in range(count):
                    info = tarfile.TarInfo(f"{number}.png")
                    info.size = len(picture(number))
                    tar.addfile(info, io.BytesIO(picture(number)))

    for replace in (lambda: write(2), lambda: path.write_bytes(bytes(3000))):
        write(6)
        planned = corpus.check_and_plan

        def plans(*parts: Any, planned: Any = planned, replace: Any = replace) -> Any:
            found = planned(*parts)
            replace()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(corpus, "check_and_plan", plans)
            with pytest.raises(DataError, match="has changed while the corpus was created"):
                corpus.run(recipe(tmp_path / "out", str(path), val_fraction=0.0))
    write(4)
    assert corpus.run(recipe(tmp_path / "out", str(path), val_fraction=0.0)).counts["train"] == 4


def test_settings_that_gave_nothing_do_not_bar_the_right_ones(inline: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor"):
        corpus.run(recipe(tmp_path, str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"all 20 are held out\. Lower corpus\.val_fraction"):
        corpus.run(recipe(tmp_path, "generated:20", image_size=16, val_fraction=1.0))
    with pytest.raises(DataError, match=r"Name another corpus\.val_source"):
        corpus.run(recipe(tmp_path, "generated:20", image_size=16, val_source="generated:20"))
    made = corpus.run(recipe(tmp_path, "generated:20", image_size=16, val_fraction=0.0))
    assert made.counts["train"] == 20


def test_only_generated_pictures_depend_on_seed_and_size(tmp_path: Path) -> None:
    def depends(source: Any, **section: Any) -> bool:
        return "seed" in corpus.stage_config(recipe(tmp_path, source, **section))

    assert (
        depends("generated")
        and depends(["/a", "generated:5"])
        and depends("/a", val_source="generated:5:val")
    )
    assert not depends("/data/ai-generated/x") and not depends(
        ["/generated/a.tar"], val_source="generated.tar"
    )


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_what_the_system_does_not_let_be_read_is_one_clear_error(
    inline: None, tmp_path: Path, name: str
) -> None:
    """A pattern that names a folder; the same error stands for permissions and devices."""
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"cannot be read .*{name}.* Check its permissions"):
        corpus.run(recipe(tmp_path / "out", f"{tmp_path}/*{name[1:]}"))


def test_a_kill_during_the_cleaning_up_costs_nothing(
    inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tmp_path, "generated:5", image_size=16, val_fraction=0.0)

    def killed(path: str) -> None:
        if path.endswith("/index"):
            raise KeyboardInterrupt
        remove(path)

    remove = storage.remove
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            corpus.run(wanted)
    assert (tmp_path / "corpus" / "index").exists()
    made = corpus.run(wanted)
    assert (made.counts["train"], made.scores["retried/kept"]) == (5, 0), "made at once"
    assert not {*corpus.WORK, corpus.LISTED} & {one.name for one in Path(made.path).iterdir()}


def test_images_under_one_key_are_told_of(
    inline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"IMG.{number:04d}.png")
            info.size = len(picture(number))
            tar.addfile(info, io.BytesIO(picture(number)))
    made = corpus.run(recipe(tmp_path / "out", str(tmp_path / "x.tar"), val_fraction=0.0))
    assert (made.counts["train"], made.counts["quarantined/second_image"]) == (1, 2)
    assert (
        "2 images are left out because they share the key of another, such as IMG.0001.png in"
        in capsys.readouterr().err
    )


def test_a_finished_corpus_whose_source_changed_is_told_of(
    inline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "0.png").write_bytes(picture(0))
    wanted = recipe(tmp_path / "out", str(source), val_fraction=0.0)
    told = "the source now lists other files"
    made = corpus.run(wanted)
    assert corpus.run(wanted) == made and told not in capsys.readouterr().err
    (source / "0.txt").write_text("a caption that came later")
    assert corpus.run(wanted) == made
    assert f"{told} than when the corpus was created; remove {made.path}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "MAX_RELISTED", 0)
        assert corpus.run(wanted) == made and told not in capsys.readouterr().err, (
            "a listing that would be dear"
        )
    source.rename(tmp_path / "gone")
    assert corpus.run(wanted) == made and told not in capsys.readouterr().err
