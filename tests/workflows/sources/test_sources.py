"""Sources: every thing that stands for an image comes out once, as a sample or as a loss with its
reason.

Covers: workflows/sources/arrow.py, workflows/sources/base.py, workflows/sources/easy_vqa.py,
workflows/sources/listing.py, workflows/sources/metadata.py, workflows/sources/tar_walk.py,
workflows/sources/webdataset.py.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.pipeline.timings import HERE
from smalti.workflows.sources import Lost, Sample, detect, find_groups, webdataset
from smalti.workflows.sources.base import clean_text, read_pairs
from smalti.workflows.sources.easy_vqa import derive, describe
from smalti.workflows.sources.listing import expand
from smalti.workflows.sources.webdataset import WINDOW, split_name

SECTION = CorpusSection()


def picture(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256, number // 256, 7)).save(stream, kind)
    return stream.getvalue()


def collect(
    source: str | list[str], section: CorpusSection = SECTION
) -> tuple[list[Sample], list[Lost]]:
    """Everything a source gives; each sample's bytes are read again by its locator and must be the
    same.
    """
    samples, lost = [], []
    for group in find_groups(source, section, 0):
        group = pickle.loads(pickle.dumps(group))
        found = list(group.samples())
        mine = [one for one in found if isinstance(one, Sample)]
        if mine:
            with group.reader() as read:
                for one in reversed(mine):
                    assert read(one.locator) == one.data
        samples += mine
        lost += [one for one in found if isinstance(one, Lost)]
    return samples, lost


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ---- folder --------------------------------------------------------------------------------------


def test_folder_reads_captions_beside_images_and_ignores_litter(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "one.JPG").write_bytes(picture(1, "JPEG"))
    (deep / "one.txt").write_text("\ufeff a  red\n ball ", encoding="utf-8")
    (tmp_path / "two.webp").write_bytes(picture(2, "WEBP"))
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._two.webp").write_bytes(b"x")
    (tmp_path / "film.mp4").write_bytes(b"x")
    samples, lost = collect(str(tmp_path))
    assert {one.key: one.caption for one in samples} == {
        "a/b/one.JPG": "a red ball",
        "two.webp": None,
    }
    assert [(one.key, one.reason) for one in lost] == [("film.mp4", "not_an_image")]
    assert all(one.label is None for one in samples), "one image lies outside a class folder"


def test_folder_takes_labels_from_class_folders(tmp_path: Path) -> None:
    for number, name in enumerate(["red_apple", "pear", "pear"]):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name / f"{number}.png").write_bytes(picture(number))
    samples, _ = collect(str(tmp_path))
    assert sorted((one.label, one.caption) for one in samples) == [
        ("pear", "pear"),
        ("pear", "pear"),
        ("red apple", "red apple"),
    ]


def test_folder_reads_metadata(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [
        json.dumps(
            {
                "file_name": "0.png",
                "text": "zero",
                "label": "x",
                "qa": [{"question": "q?", "answer": "a"}],
            }
        ),
        json.dumps({"file_name": "0.png", "question": "more?", "answer": 5}),
        "{not json",
        json.dumps({"file_name": "gone.png", "text": "nothing"}),
        json.dumps({"file_name": "1.png", "qa": ["wrong"]}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    samples, lost = collect(str(tmp_path))
    zero = next(one for one in samples if one.key == "0.png")
    assert (zero.caption, zero.label, zero.qa) == ("zero", "x", (("q?", "a"), ("more?", "5")))
    assert sorted((one.key, one.reason) for one in lost) == [
        ("gone.png", "missing"),
        ("metadata.jsonl:3", "bad_metadata"),
        ("metadata.jsonl:5", "bad_metadata"),
    ]


def test_folder_reads_csv_metadata_relative_to_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "0.png").write_bytes(picture(0))
    (tmp_path / "part" / "metadata.csv").write_text('file_name,caption,kind\n0.png,"a, b",k\n')
    samples, lost = collect(str(tmp_path), CorpusSection(label_column="kind"))
    assert [(one.key, one.caption, one.label) for one in samples] == [("part/0.png", "a, b", "k")]
    assert not lost
    (tmp_path / "metadata.csv").write_text("name,caption\n")
    with pytest.raises(DataError, match="no column file_name; it has"):
        collect(str(tmp_path))


def test_folder_order_mixes_classes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.png").write_bytes(picture(number))
    labels = [one.label for one in collect(str(tmp_path))[0]]
    assert labels != sorted(label for label in labels if label)
    assert 5 <= labels[:20].count("a") <= 15
    assert labels == [one.label for one in collect(str(tmp_path))[0]]


# ---- webdataset ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("cut", ["member", "header", "marker"])
def test_truncated_tar_keeps_the_good_samples_and_tells_the_loss(tmp_path: Path, cut: str) -> None:
    path = write_tar(
        tmp_path / "x.tar", [(f"{number}.png", picture(number)) for number in range(20)]
    )
    sample = 512 + -(-len(picture(0)) // 512) * 512
    data = path.read_bytes()
    keep = {"member": 12 * sample + 512 + 40, "header": 12 * sample, "marker": 20 * sample}[cut]
    path.write_bytes(data[:keep])
    samples, lost = collect(str(path))
    assert len(samples) == (20 if cut == "marker" else 12)
    assert [one.reason for one in lost] == ["truncated_tar"]


@pytest.mark.parametrize(
    "members",
    [["a.png", "a.txt"], ["a.txt", "a.png"], ["a.mask.png", "a.png"], ["a.1.png", "a.2.png"]],
)
def test_tar_cut_inside_a_sample_is_one_loss_and_keeps_a_whole_image(
    tmp_path: Path, members: list[str]
) -> None:
    """A cut caption costs no image; of a cut image nothing else is taken for it."""
    path = write_tar(tmp_path / "x.tar", [(members[0], picture(1)), (members[1], b"y" * 2000)])
    size = 512 + -(-len(picture(1)) // 512) * 512 + 512 + 100
    path.write_bytes(path.read_bytes()[:size])
    samples, lost = collect(str(path))
    assert [one.data for one in samples] == (
        [picture(1)] if members[0] in ("a.png", "a.1.png") else []
    )
    assert [(one.key, one.reason) for one in lost] == [(members[1], "truncated_tar")]


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
    HERE.drain()
    samples, lost = collect(str(write_tar(tmp_path / "x.tar", near + labels)))
    late = [one.label for one in samples].count(None)
    assert len(samples) == number and not lost and late >= 10
    assert HERE.drain()["left_out/late_texts"] == late


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


def test_tar_with_sparse_members_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1) + bytes(1 << 20))
    os.truncate(tmp_path / "a.png", 2 << 20)
    (tmp_path / "b.png").write_bytes(picture(2))
    subprocess.run(["tar", "-cSf", "x.tar", "a.png", "b.png"], cwd=tmp_path, check=True)
    samples, lost = collect(str(tmp_path / "x.tar"))
    assert [one.key for one in samples] == ["b"]
    assert [(one.key, one.reason, one.detail) for one in lost] == [
        ("a", "no_image", "members: png (a sparse file)")
    ]


def test_tar_whose_header_holds_no_number_is_torn(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", picture(1))])
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("b.png")
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.realsize": "9",
        }
        info.size = 512
        tar.addfile(info, io.BytesIO(b"none\n" + bytes(507)))
    samples, lost = collect(str(path))
    assert [one.key for one in samples] == ["a"]
    assert [one.reason for one in lost] == ["truncated_tar"]


def test_tar_takes_a_named_caption_column_before_the_text(tmp_path: Path) -> None:
    said = {"alt": "from alt", "caption": {"text": "in a mapping", "score": 1}}
    members = [("a.png", picture(1)), ("a.txt", b"from txt"), ("a.json", json.dumps(said).encode())]
    path = str(write_tar(tmp_path / "x.tar", members))
    assert [one.caption for one in collect(path)[0]] == ["from txt"]
    assert [one.caption for one in collect(path, CorpusSection(caption_column="alt"))[0]] == [
        "from alt"
    ]


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100])
def test_a_file_that_is_no_tar_is_lost(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    samples, lost = collect(str(tmp_path / "x.tar"))
    assert not samples
    assert [one.reason for one in lost] == ["truncated_tar"]


def test_compressed_tars_and_a_truncated_one(tmp_path: Path) -> None:
    members = [(f"{number}.png", picture(number)) for number in range(5)]
    plain = write_tar(tmp_path / "x.tar", members).read_bytes()
    (tmp_path / "y.tar.gz").write_bytes(gzip.compress(plain))
    assert len(collect(str(tmp_path / "y.tar.gz"))[0]) == 5
    for name, mode in (("y.tbz2", "w:bz2"), ("y.txz", "w:xz")):
        assert len(collect(str(write_tar(tmp_path / name, members, mode)))[0]) == 5
    (tmp_path / "z.tgz").write_bytes(gzip.compress(plain, 0)[:3000])
    samples, lost = collect(str(tmp_path / "z.tgz"))
    assert 0 < len(samples) < 5
    assert lost[-1].reason == "truncated_tar"


def test_brace_patterns_and_globs(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"part-{number:05d}.tar", [(f"{number}.png", picture(number))])
    assert len(collect(str(tmp_path / "part-{00000..00002}.tar"))[0]) == 3
    assert len(collect(str(tmp_path / "part-*.tar"))[0]) == 3
    assert len(collect(str(tmp_path))[0]) == 3, "a folder of tars"
    assert expand(str(tmp_path / "part-0000{2,0}.tar")) == [
        str(tmp_path / f"part-0000{n}.tar") for n in (2, 0)
    ]
    assert len(expand(str(tmp_path / "part-0000{{0,2},{1..1}}.tar"))) == 3
    with pytest.raises(DataError, match="part-00003"):
        collect(str(tmp_path / "part-{00000..00003}.tar"))


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


def test_tar_damage_behind_the_last_member_is_told(tmp_path: Path) -> None:
    """The checksum of a compressed tar, and a second archive behind the first, are looked at too."""
    plain = write_tar(tmp_path / "x.tar", [("a.png", picture(1))]).read_bytes()
    packed = bytearray(gzip.compress(plain))
    packed[-8] ^= 1
    (tmp_path / "sum.tar.gz").write_bytes(packed)
    (tmp_path / "two.tar").write_bytes(
        plain + write_tar(tmp_path / "y.tar", [("b.png", picture(2))]).read_bytes()
    )
    for name in ("sum.tar.gz", "two.tar"):
        samples, lost = collect(str(tmp_path / name))
        assert [one.key for one in samples] == ["a"]
        assert [one.reason for one in lost] == ["truncated_tar"]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_tar_that_is_not_compressed_as_its_name_says_is_lost(tmp_path: Path, suffix: str) -> None:
    path = write_tar(tmp_path / f"x.tar.{suffix}", [("a.png", picture(1))])
    samples, lost = collect(str(path))
    assert (samples, [one.reason for one in lost]) == ([], ["truncated_tar"])


def test_paths_that_look_like_patterns(tmp_path: Path) -> None:
    for folder in ("[x] y", "{z}"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "t.tar", [("a.png", picture(1))])
        (tmp_path / folder / "._t.tar").write_bytes(b"litter")
        assert [one.key for one in collect(str(tmp_path / folder / "t.tar"))[0]] == ["a"]
        samples, lost = collect(str(tmp_path / folder))
        assert ([one.key for one in samples], lost) == (["a"], [])


def test_relative_sources_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor of a cluster stands in another folder than the command."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(picture(0))
    write_tar(tmp_path / "x.tar", [("a.png", picture(1))])
    pq.write_table(pa.table({"image": [picture(2)]}), tmp_path / "x.parquet")
    monkeypatch.chdir(tmp_path)
    groups = list(find_groups(["in", "./*.tar", "x.parquet"], SECTION, 0))
    monkeypatch.chdir("/")
    assert [one.key for group in groups for one in group.samples()] == ["0.png", "a", "0:0"]


def test_split_name() -> None:
    assert split_name("./a.b/c.Left.PNG") == ("a.b/c", "left.png")


# ---- parquet -------------------------------------------------------------------------------------


def test_parquet_with_hugging_face_structs_class_names_and_questions(tmp_path: Path) -> None:
    image = pa.array(
        [
            {"bytes": picture(1), "path": "1.png"},
            {"bytes": None, "path": "2.png"},
            {"bytes": picture(3), "path": None},
        ]
    )
    qa = pa.array(
        [[{"question": "q", "answer": "a"}], None, []],
        pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())])),
    )
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": image, "text": ["one", "two", None], "label": [1, 0, -1], "qa": qa})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}),
        tmp_path / "x.parquet",
        row_group_size=2,
    )
    samples, lost = collect(str(tmp_path / "x.parquet"), CorpusSection(shard_images=1))
    assert [(one.key, one.caption, one.label, one.qa) for one in samples] == [
        ("0:0", "one", "dog", (("q", "a"),)),
        ("1:0", None, None, ()),
    ]
    assert [(one.key, one.reason) for one in lost] == [("0:1", "no_image")]


def test_parquet_columns_are_named_in_errors(tmp_path: Path) -> None:
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"jpg": [picture(1)], "alt": ["x"], "url": ["u"]}), path)
    with pytest.raises(DataError, match=r"no column 'image' .* jpg, alt, url"):
        collect(path)
    with pytest.raises(DataError, match=r"column 'url' is string; expected encoded image bytes"):
        collect(path, CorpusSection(image_column="url"))
    with pytest.raises(DataError, match=r"no column 'tags' \(corpus.caption_column\)"):
        collect(path, CorpusSection(image_column="jpg", caption_column="tags"))
    samples, _ = collect(path, CorpusSection(image_column="jpg", caption_column="alt"))
    assert [one.caption for one in samples] == ["x"]


def test_parquet_of_other_writers(tmp_path: Path) -> None:
    """Views (polars), text that is not UTF-8, upper-case names, questions as JSON text."""
    raw = pa.array([b"caf\xe9", b"good"], pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    image = pa.array([picture(1), picture(2)], pa.binary_view())
    table = pa.table({"image": image, "caption": captions, "qa": ["", '[["q", "a"]]']})
    pq.write_table(table, tmp_path / "X.PARQUET")
    samples, lost = collect(str(tmp_path))
    assert [(one.key, one.caption, one.qa) for one in samples] == [("0:1", "good", (("q", "a"),))]
    assert [(one.key, one.reason) for one in lost] == [("0:0", "bad_metadata")]


def test_torn_parquet_is_lost(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [picture(n) for n in range(9)]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:300])
    footer = bytearray((tmp_path / "a.parquet").read_bytes())
    start = len(footer) - 8 - int.from_bytes(footer[-8:-4], "little")
    footer[start : start + 20] = b"\xff" * 20
    (tmp_path / "c.parquet").write_bytes(footer)
    groups = list(find_groups(str(tmp_path), SECTION, 0))
    samples, lost = collect(str(tmp_path))
    assert len(samples) == 9
    assert [one.reason for one in lost] == ["torn_file", "torn_file"]
    assert [Path(group.source).name for group in groups] == ["a.parquet", "b.parquet", "c.parquet"]


# ---- easy-vqa, generated, detection --------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("what color is the shape?", "blue")], ("blue", None)),
        ([("what is the blue shape?", "rectangle")], ("blue", "rectangle")),
        ([("what color is the circle?", "red")], ("red", "circle")),
        (
            [("is there a teal shape?", "yes"), ("does the image contain a circle?", "yes")],
            ("teal", "circle"),
        ),
        ([("is there not a circle?", "no")], (None, "circle")),
        ([("is no gray shape present?", "yes")], (None, None)),
        ([("is there a circle?", "no"), ("is there not a triangle?", "yes")], (None, "rectangle")),
    ],
)
def test_easy_vqa_answers_imply_colour_and_shape(
    pairs: list[tuple[str, str]], expected: tuple[str | None, str | None]
) -> None:
    assert derive(pairs) == expected


def test_easy_vqa_contradiction_and_description() -> None:
    with pytest.raises(DataError, match="contradict"):
        derive([("is there a circle?", "no"), ("what is the red shape?", "circle")])
    assert describe("blue", "circle") == ("a blue circle", "blue circle")
    assert describe("blue", None) == ("a blue shape", None)
    assert describe(None, "circle") == ("a circle", None)
    assert describe(None, None) == (None, None)


def test_easy_vqa_as_published() -> None:
    """5,000 pictures, 48,248 questions; 3,578 and 888 get both words (counted by a separate
    script).
    """
    pytest.importorskip("easy_vqa")
    for split, images, questions, both in (
        ("train", 4000, 38_575, 3578),
        ("test", 1000, 9673, 888),
    ):
        samples, lost = collect(f"easy-vqa:{split}")
        assert (len(samples), len(lost)) == (images, 0)
        assert sum(len(one.qa) for one in samples) == questions
        assert sum(one.label is not None for one in samples) == both
    with pytest.raises(DataError, match="easy-vqa:train or easy-vqa:test"):
        collect("easy-vqa")


def test_generated_is_seeded_and_names_differ() -> None:
    first, again = (next(find_groups("generated:6", SECTION, 3)) for _ in range(2))
    assert list(first.samples()) == list(again.samples())
    ids = {one.data for name in ("generated:6", "generated:6:val") for one in collect(name)[0]}
    assert len(ids) == 12
    assert all(one.caption == f"a {one.label}" for one in collect("generated:6")[0])


def test_detection(tmp_path: Path) -> None:
    assert detect("easy-vqa:train") == "easy-vqa"
    assert detect("generated") == "generated"
    assert detect("s3://bucket/x-{000..010}.tar") == "webdataset"
    assert detect("x/*.parquet") == "parquet"
    (tmp_path / "a.png").write_bytes(picture(1))
    assert detect(str(tmp_path)) == "folder"
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="several kinds of data"):
        detect(str(tmp_path))
    with pytest.raises(DataError, match=r"is compressed.* Unpack it"):
        detect("x/a.jsonl.gz")
    with pytest.raises(DataError, match="neither a folder nor"):
        detect(str(tmp_path / "a.png"))
    with pytest.raises(DataError, match=r"corpus\.source is not set"):
        list(find_groups(None, SECTION, 0))


def test_texts_and_pairs() -> None:
    assert clean_text(["", " a \n b "]) == "a b"
    assert clean_text(float("nan")) is None
    assert read_pairs({"question": ["a", "b"], "answer": ["c", "d"]}) == (("a", "c"), ("b", "d"))
    assert clean_text({"lang": "en", "text": " a  b"}) == "a b" and clean_text({"raw": 1}) is None
    assert read_pairs({"question": "a", "answers": ["b"]}) == (), "a table of another kind"
    HERE.drain()
    assert read_pairs({"question": ["a", "b"], "answer": [None, "c"], "qa": [["d", ""]]}) == (
        ("b", "c"),
    )
    assert HERE.drain() == {"left_out/half_pairs": 2}
    with pytest.raises(ValueError, match="qa holds"):
        read_pairs({"qa": ["wrong"]})


def test_sources_on_an_object_store() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    try:
        fs.pipe_file("/smalti-sources/in/a/0.png", picture(0))
        fs.pipe_file("/smalti-sources/in/b/1.png", picture(1))
        samples, _ = collect("memory://smalti-sources/in")
        assert sorted((one.key, one.label) for one in samples) == [
            ("a/0.png", "a"),
            ("b/1.png", "b"),
        ]
        stream = io.BytesIO()
        pq.write_table(pa.table({"image": [picture(2)]}), stream)
        fs.pipe_file("/smalti-sources/p/x.parquet", stream.getvalue())
        assert len(collect("memory://smalti-sources/p/*.parquet")[0]) == 1
        assert len(collect("memory://smalti-sources/p")[0]) == 1
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            info = tarfile.TarInfo("k.png")
            info.size = len(picture(3))
            tar.addfile(info, io.BytesIO(picture(3)))
        fs.pipe_file("/smalti-sources/t/x-0.tar", stream.getvalue())
        samples, lost = collect("memory://smalti-sources/t/x-{0..0}.tar")
        assert ([one.key for one in samples], lost) == (["k"], [])
    finally:
        fs.rm("/smalti-sources", recursive=True)
