"""Folders of images as people and programs leave them: captions, links, metadata, damage."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources import Lost, Sample, find_groups


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 7, 7)).save(stream, "PNG")
    return stream.getvalue()


def collect(source: Path, **section: str) -> tuple[list[Sample], list[Lost]]:
    found = [one for group in find_groups(str(source), CorpusSection(**section), 0) for one in group.samples()]
    return [one for one in found if isinstance(one, Sample)], [one for one in found if isinstance(one, Lost)]


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
    assert sorted((one.key, one.label) for one in samples) == [("cat/3.png", "cat"), ("dog/1.png", "dog")]
    assert sorted((one.key, one.reason) for one in lost) == [
        ("cat/2.png", "unreadable"),
        ("cat/gone.png", "unreadable"),
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_counts_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    (tmp_path / "1.png").write_bytes(picture(1))
    samples, lost = collect(tmp_path)
    assert ([one.key for one in samples], [(one.key, one.reason) for one in lost]) == (
        ["1.png"],
        [("shut", "unreadable")],
    )


def test_folder_reads_metadata_as_programs_write_it(tmp_path: Path) -> None:
    """U+2028 inside a JSON string, CRLF, a byte order mark, a path with detours, half a surrogate pair, no file name."""
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
    (tmp_path / "listed" / "metadata.csv").write_text(f"file_name,text,label\n{whole},from metadata,x\n")
    (tmp_path / "beside" / whole.replace("png", "txt")).write_text("from beside")
    samples, lost = collect(tmp_path)
    assert sorted((one.key, one.caption) for one in samples) == [
        (f"beside/{apart}", "from beside"),
        (f"listed/{apart}", "from metadata"),
    ]
    assert not lost


def test_a_column_that_no_metadata_file_has_is_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "alt": "a cat", "kind": "cat"}')
    samples, _ = collect(tmp_path, caption_column="alt", label_column="kind")
    assert [(one.caption, one.label) for one in samples] == [("a cat", "cat")]
    with pytest.raises(
        DataError, match=r"no column 'capton' \(corpus\.caption_column\); they have alt, file_name, kind"
    ):
        collect(tmp_path, caption_column="capton")
