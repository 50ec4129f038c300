"""WebDataset tars: samples by key, members in any order, texts far from their image."""

from __future__ import annotations

import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from smalti.schema import CorpusSection
from smalti.workflows.pipeline.timings import PROCESS_TALLY
from smalti.workflows.sources import webdataset
from smalti.workflows.sources.webdataset import WINDOW, split_name
from tests.workflows.sources.written import collect, picture, write_tar


def test_tar_groups_members_by_key_in_any_order(tmp_path: Path) -> None:
    members = [
        (
            "./00/a.json",
            json.dumps({"caption": "from json", "label": 3, "qa": [["is it?", "yes"]]}).encode(),
        ),
        ("00/b.txt", b"second"),
        ("00/b.JPEG", picture(2, "JPEG")),
        ("00/a.jpg", picture(1, "JPEG")),
        ("00/c.cls", b"7"),
        ("00/c.mask.png", picture(9)),
        ("00/c.webp", picture(3, "WEBP")),
        ("00/.hidden.jpg", b"x"),
        ("00/d.txt", b"no image"),
        ("00/a.npy", b"other data"),
    ]
    samples, lost = collect(str(write_tar(tmp_path / "x.tar", members)))
    seen = {one.key: (one.caption, one.label, one.qa) for one in samples}
    assert seen == {
        "00/a": ("from json", "3", (("is it?", "yes"),)),
        "00/b": ("second", None, ()),
        "00/c": (None, "7", ()),
    }
    assert next(one for one in samples if one.key == "00/c").data == picture(3, "WEBP")
    assert [(one.key, one.reason) for one in lost] == [("00/d", "no_image")]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["images first", "texts first", "one too late"])
def test_tar_takes_members_in_any_order(tmp_path: Path, order: str, packed: bool) -> None:
    """Further apart than the window: archives that sort by extension."""
    images = [(f"{number:05d}.png", picture(number)) for number in range(WINDOW + 10)]
    texts = [(f"{number:05d}.txt", f"text {number}".encode()) for number in range(WINDOW + 10)]
    alone = [("alone.txt", b"no image")]
    members = {
        "images first": images + texts + alone,
        "texts first": alone + texts + images,
        "one too late": [*images, texts[0], *alone],
    }[order]
    name = "x.tar.gz" if packed else "x.tar"
    samples, lost = collect(str(write_tar(tmp_path / name, members, "w:gz" if packed else "w")))
    assert [one.key for one in samples] == [f"{number:05d}" for number in range(WINDOW + 10)]
    texted = 1 if order == "one too late" else len(samples)
    assert [one.caption for one in samples[:texted]] == [
        f"text {number}" for number in range(texted)
    ]
    assert [(one.key, one.reason) for one in lost] == [("alone", "no_image")]


def test_tar_whose_names_hold_dots_holds_one_image_of_a_key(tmp_path: Path) -> None:
    members = [
        (f"www.site.com_{number}.jpg", bytes([number % 256]) * 100_000) for number in range(300)
    ]
    path = write_tar(tmp_path / "x.tar", members)
    tracemalloc.start()
    samples, lost = collect(str(path))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert [one.data for one in samples] == [members[0][1]]
    assert [(one.key, one.reason) for one in lost] == [
        (name, "second_image") for name, _ in members[1:]
    ]


def test_tar_texts_too_far_behind_an_image_with_others_are_counted(tmp_path: Path) -> None:
    """Captions beside the images, labels far behind: the tar is not gone through twice for each
    image.
    """
    number = WINDOW + 10
    near = [
        (f"{n}.{kind}", data)
        for n in range(number)
        for kind, data in (("png", picture(n)), ("txt", b"near"))
    ]
    labels = [(f"{n}.cls", b"7") for n in range(number)]
    PROCESS_TALLY.drain()
    samples, lost = collect(str(write_tar(tmp_path / "x.tar", near + labels)))
    late = [one.label for one in samples].count(None)
    assert len(samples) == number and not lost and late >= 10
    assert PROCESS_TALLY.drain()["left_out/late_texts"] == late


def test_tar_members_that_wait_are_bounded_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts far behind their images are found all the same."""
    monkeypatch.setattr(webdataset, "WINDOW_BYTES", 5 * len(picture(0)))
    members = [(f"{number}.png", picture(number)) for number in range(20)]
    members += [(f"{number}.txt", str(number).encode()) for number in range(20)]
    passed = []
    monkeypatch.setattr(
        webdataset._Far, "_scan", lambda self, scan=webdataset._Far._scan: passed.append(scan(self))
    )
    samples, lost = collect(str(write_tar(tmp_path / "x.tar", members)))
    assert [one.caption for one in samples] == [str(number) for number in range(20)] and not lost
    assert len(passed) == 1


def test_tar_gives_an_image_the_first_text_of_its_key(tmp_path: Path) -> None:
    members = [
        ("a.png", picture(1)),
        ("a.txt", b"first"),
        ("a.png", picture(2)),
        ("a.txt", b"last"),
    ]
    samples, lost = collect(str(write_tar(tmp_path / "x.tar", members)))
    assert [(one.data, one.caption) for one in samples] == [(picture(1), "first")]
    assert [(one.key, one.reason) for one in lost] == [("a.png", "second_image")]


def test_tar_takes_a_named_caption_column_before_the_text(tmp_path: Path) -> None:
    said = {"alt": "from alt", "caption": {"text": "in a mapping", "score": 1}}
    members = [("a.png", picture(1)), ("a.txt", b"from txt"), ("a.json", json.dumps(said).encode())]
    path = str(write_tar(tmp_path / "x.tar", members))
    assert [one.caption for one in collect(path)[0]] == ["from txt"]
    assert [one.caption for one in collect(path, CorpusSection(caption_column="alt"))[0]] == [
        "from alt"
    ]


def test_tar_counts_what_is_no_sample(tmp_path: Path) -> None:
    """Dots in names make one key of two pictures; a name twice; formats that cannot be read; links."""
    members = [
        ("Shot at 10.22.33.png", picture(1)),
        ("Shot at 10.45.01.png", picture(2)),
        ("twice.png", picture(3)),
        ("twice.png", picture(4)),
        ("phone.heic", b"x"),
        ("noext", b"x"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "twice.png"
        tar.addfile(link)
    samples, lost = collect(str(path))
    assert [(one.key, one.data) for one in samples] == [
        ("Shot at 10", picture(1)),
        ("twice", picture(3)),
    ]
    assert [(one.key, one.reason) for one in lost] == [
        ("Shot at 10.45.01.png", "second_image"),
        ("twice.png", "second_image"),
        ("phone", "no_image"),
        ("noext", "no_image"),
        ("link", "no_image"),
    ]
    assert "10.22.33.png" in lost[0].detail
    assert lost[-1].detail == "members: png (a link)"


def test_split_name() -> None:
    assert split_name("./a.b/c.Left.PNG") == ("a.b/c", "left.png")
