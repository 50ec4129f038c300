"""Folders of images as people and programs leave them: captions, links, metadata, damage.

Covers: workflows/sources/sorted_records.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources import Sample, Unusable, find_groups, listed, sorted_records


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 7, 7)).save(stream, "PNG")
    return stream.getvalue()


def collect(source: Path, **section: str) -> tuple[list[Sample], list[Unusable]]:
    found = [
        one
        for group in find_groups(str(source), CorpusSection(**section), 0)
        for one in group.samples()
    ]
    return [one for one in found if isinstance(one, Sample)], [
        one for one in found if isinstance(one, Unusable)
    ]


def test_folder_takes_text_as_people_write_it(tmp_path: Path) -> None:
    """Captions of Windows: upper-case suffixes, UTF-16; several lines; nothing."""
    for number, name in enumerate(["A.JPG", "b c.png", "é.png", "wide.png"]):
        (tmp_path / name).write_bytes(picture(number))
    (tmp_path / "A.TXT").write_text("upper")
    (tmp_path / "b c.txt").write_text(" \n")
    (tmp_path / "é.txt").write_bytes(b"one\r\n\r\ntwo\n")
    (tmp_path / "wide.txt").write_text("hello", encoding="utf-16")
    captions = {one.key: one.caption for one in collect(tmp_path)[0]}
    assert captions == {"A.JPG": "upper", "b c.png": None, "é.png": "one two", "wide.png": "hello"}


def test_a_caption_file_beside_an_image_is_its_text(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        (tmp_path / f"{number}.caption").write_text(f"caption {number}")
    (tmp_path / "1.txt").write_text("text 1")
    samples, lost = collect(tmp_path)
    assert ({one.key: one.caption for one in samples}, lost) == (
        {"0.png": "caption 0", "1.png": "text 1"},
        [],
    )
    os.truncate(tmp_path / "1.txt", CorpusSection().max_bytes + 1)
    assert {one.key: one.caption for one in collect(tmp_path)[0]} == {
        "0.png": "caption 0",
        "1.png": None,
    }


def test_folder_follows_links_once_and_counts_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(picture(1))
    folder = tmp_path / "in"
    (folder / "cat").mkdir(parents=True)
    for number in (2, 3):
        (folder / "cat" / f"{number}.png").write_bytes(picture(number))
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "round").symlink_to(folder)
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "cat" / "2.txt").symlink_to(tmp_path / "nowhere")
    samples, lost = collect(folder)
    assert sorted((one.key, one.label) for one in samples) == [
        ("cat/3.png", "cat"),
        ("dog/1.png", "dog"),
    ]
    assert sorted((one.key, one.reason) for one in lost) == [
        ("cat/2.png", "unreadable"),
        ("cat/gone.png", "unreadable"),
    ]


def test_what_is_no_file_is_counted_and_not_waited_for(tmp_path: Path) -> None:
    """A pipe, a device that gives bytes without end, a link to itself: as images, as a caption, as
    a line's image.
    """
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "round.png").symlink_to("round.png")
    (tmp_path / "0.png").write_bytes(picture(0))
    os.mkfifo(tmp_path / "0.txt")
    lost = collect(tmp_path)[1]
    names = ["0.png", "endless.png", "pipe.png", "round.png"]
    assert sorted((one.key, one.reason) for one in lost) == [(name, "unreadable") for name in names]
    lines = tmp_path / "x.jsonl"
    lines.write_text("\n".join(json.dumps({"image": name}) for name in names))
    samples, lost = collect(lines)
    assert ([one.key for one in samples], [one.reason for one in lost]) == (
        ["1"],
        ["unreadable"] * 3,
    )
    os.mkfifo(tmp_path / "metadata.csv")
    with pytest.raises(DataError, match=r"cannot be read .*metadata\.csv is a pipe"):
        collect(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_counts_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    (tmp_path / "1.png").write_bytes(picture(1))
    samples, lost = collect(tmp_path)
    assert ([one.key for one in samples], [(one.key, one.reason) for one in lost]) == (
        ["1.png"],
        [("shut", "unreadable")],
    )


def test_a_long_listing_is_sorted_on_disk_to_the_same_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few names are held: images by the hash of their paths, what is lost by folder, name,
    and row.
    """
    names = [f"{folder}/{number}.png" for folder in ("cat_1", "dog") for number in range(9)]
    (tmp_path / "cat_1").mkdir()
    (tmp_path / "dog").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text("beside")
    rows = [
        {"file_name": name, "question": f"{name}?", "answer": "a"}
        for name in [*names[:4], "z", *names[:2], "b", "z"]
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    for name in (b"z.doc", b"a.doc", b"\xff.doc"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    whole = list(find_groups(str(tmp_path), CorpusSection(shard_images=5), 0))
    monkeypatch.setattr(sorted_records, "HELD", 2)
    monkeypatch.setattr(sorted_records, "BLOCK_BYTES", 50)
    assert list(find_groups(str(tmp_path), CorpusSection(shard_images=5), 0)) == whole
    entries = [entry for group in whole for entry in group.entries]  # type: ignore[attr-defined]
    assert [one.path for one in entries] == sorted(
        names, key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    assert {one.label for one in entries} == {"cat 1", "dog"}
    pairs = {name: [(f"{name}?", "a")] * (2 - number // 2) for number, name in enumerate(names[:4])}
    assert {one.path: list(one.qa) for one in entries if one.qa} == pairs
    lost = [one.key for group in whole for one in group.lost]  # type: ignore[attr-defined]
    assert lost == ["a.doc", "z.doc", "\udcff.doc", "metadata.jsonl:10", "z", "b"]


def test_a_listed_group_is_small_and_gives_what_the_group_gives(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(200):
        (folder / os.fsdecode(b"\xff%d.png" % number)).write_bytes(picture(number))
    (folder / "x.doc").write_text("")
    groups = list(find_groups(str(folder), CorpusSection(shard_images=200), 0))
    kept = [listed(group, str(tmp_path / f"{number}.json")) for number, group in enumerate(groups)]
    assert [list(one.samples()) for one in kept] == [list(one.samples()) for one in groups]
    assert len(pickle.dumps(kept[0])) < 500
    sample = next(iter(kept[0].samples()))
    assert isinstance(sample, Sample)
    with kept[0].reader() as read:
        assert read(sample.locator) == sample.data


def test_folder_reads_metadata_as_programs_write_it(tmp_path: Path) -> None:
    """U+2028 inside a JSON string, CRLF, a byte order mark, a path with detours, half a surrogate
    pair, no file name.
    """
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [
        '{"file_name": "0.png", "text": "a\u2028b\x85c"}',
        '{"file_name": "./x/..//1.png", "text": "\\ud83d x"}',
        '{"file_name": null, "text": "whose?"}',
        '{"text": "whose?"}',
        '{"file_name": "2.png", "qa": "[[\\"q\\", \\"a\\"]]"}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(("\ufeff" + "\r\n".join(rows)).encode())
    samples, lost = collect(tmp_path)
    assert {one.key: (one.caption, one.qa) for one in samples} == {
        "0.png": ("a b c", ()),
        "1.png": ("? x", ()),
        "2.png": (None, (("q", "a"),)),
    }
    assert [(one.key, one.reason) for one in lost] == [
        ("metadata.jsonl:3", "bad_metadata"),
        ("metadata.jsonl:4", "bad_metadata"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_folder_reads_csv_as_people_write_it(tmp_path: Path, end: str) -> None:
    """Spaces after commas, every kind of line end; a row that is no CSV costs itself, not the run."""
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [
        "file_name, caption ,label",
        '0.png, "a cat, sitting", cat',
        "1.png",
        '2.png,"6"x4",x',
        f"3.png,{'x' * 140_000}",
    ]
    rows.append("4.png,last,")
    (tmp_path / "METADATA.csv").write_text(end.join(rows), newline="")
    samples, lost = collect(tmp_path)
    assert {one.key: (one.caption, one.label) for one in samples} == {
        "0.png": ("a cat, sitting", "cat"),
        **{f"{number}.png": (None, None) for number in (1, 2, 3)},
        "4.png": ("last", None),
    }
    assert [(one.key, one.reason) for one in lost] == [
        ("METADATA.csv:4", "bad_metadata"),
        ("METADATA.csv:5", "bad_metadata"),
    ]


@pytest.mark.parametrize("text", ["", "file_name;caption\n0.png;x", '"file_name,caption\n0.png,x'])
def test_csv_metadata_without_its_columns_is_told_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=f"{tmp_path}/metadata.csv"):
        collect(tmp_path)


def test_names_are_joined_however_their_accents_are_written(tmp_path: Path) -> None:
    """A file system may take `é` apart into two characters, and metadata holds it as one."""
    apart, whole = "cafe\u0301.png", "caf\u00e9.png"
    for folder in ("listed", "beside"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / apart).write_bytes(picture(len(folder)))
    (tmp_path / "listed" / "metadata.csv").write_text(
        f"file_name,text,label\n{whole},from metadata,x\n"
    )
    (tmp_path / "beside" / whole.replace("png", "txt")).write_text("from beside")
    samples, lost = collect(tmp_path)
    assert sorted((one.key, one.caption) for one in samples) == [
        (f"beside/{apart}", "from beside"),
        (f"listed/{apart}", "from metadata"),
    ]
    assert not lost


def test_a_column_that_no_metadata_file_has_is_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "alt": "a cat", "kind": "cat"}'
    )
    samples, _ = collect(tmp_path, caption_column="alt", label_column="kind")
    assert [(one.caption, one.label) for one in samples] == [("a cat", "cat")]
    with pytest.raises(
        DataError,
        match=r"no column 'capton' \(corpus\.caption_column\); they have alt, file_name, kind",
    ):
        collect(tmp_path, caption_column="capton")
