"""Fifty kinds of broken input: each ends in a sample, a counted loss, or one clear error before any
work.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalti import shards
from smalti.errors import ArtifactError, DataError
from smalti.schema import CorpusSection, Recipe
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.corpus.index import IndexGroup
from smalti.workflows.sources import Sample, find_groups

KEPT = "kept"
SPLITS = ("train", "val", "quarantine")
Members = list[tuple[str, bytes]]
Make = Callable[[], bytes]


def picture(number: int, kind: str = "PNG", size: int = 24, **more: object) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind, **more)
    return stream.getvalue()


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG that claims a size and holds these (raw) pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    )


def tar(members: Members, mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def special_tar(kind: bytes) -> bytes:
    """A tar with one picture and one member that is no file: a link out of the archive, a device."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("evil.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
        good = tarfile.TarInfo("good.png")
        good.size = len(data := picture(kind[0]))
        archive.addfile(good, io.BytesIO(data))
    return stream.getvalue()


def damaged(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def parquet(columns: dict[str, object] | pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink)
    return sink.getvalue()


def hugging(metadata: str) -> pa.Table:
    """A table with classes whose metadata is this text."""
    table = pa.table({"image": [picture(73)], "label": [0]})
    return table.replace_schema_metadata({"huggingface": metadata})


def large_member() -> bytes:
    """A tar whose second header tells of more bytes than any disk has."""
    info = tarfile.TarInfo("b.png")
    info.size = 10**18
    return (
        tar([("a.png", picture(74))]).rstrip(b"\0").ljust(2560, b"\0")
        + info.tobuf(tarfile.GNU_FORMAT)
        + bytes(1024)
    )


def arrow(numbers: list[int]) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"image": [picture(n) for n in numbers]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue()


def not_utf8() -> bytes:
    """A table whose second caption is no UTF-8."""
    texts = pa.array([b"fine", b"\xff\xfe\xfa"], pa.binary()).view(pa.string())
    return parquet({"image": [picture(71), picture(72)], "caption": texts})


TWO: Members = [("a.png", picture(1)), ("b.png", picture(2))]
JPEG = picture(3, "JPEG", 64)

# what lies in a folder of images: name → (content, what becomes of it; None: it is no image and not
# counted)
FILES: dict[str, tuple[bytes, str | None]] = {
    "good.png": (picture(10), KEPT),
    "GOOD.JPEG": (picture(11, "JPEG"), KEPT),
    "really-a-png.jpg": (picture(12), KEPT),
    "trailing.png": (picture(13) + b"garbage after the end", KEPT),
    "twice.png": (picture(10), "duplicate"),
    "empty.png": (b"", "empty"),
    "zeros.jpg": (bytes(4096), "undecodable"),
    "text.jpg": (b"<html>404 not found</html>", "undecodable"),
    "pdf.png": (b"%PDF-1.4 \n%\xe2\xe3", "undecodable"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "undecodable"),
    "magic-only.png": (b"\x89PNG\r\n\x1a\n", "undecodable|truncated"),
    "head-only.jpg": (JPEG[:20], "undecodable|truncated"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "half.png": (picture(14)[:300], "truncated"),
    "half.webp": (picture(15, "WEBP")[:200], "undecodable|truncated"),
    "half.gif": (picture(16, "GIF")[:400], "undecodable|truncated"),
    "bomb.png": (png(50_000, 50_000, bytes(99)), "bomb"),
    "flat.png": (png(60_000, 1, bytes(180_001)), "too_small"),
    "zero-wide.png": (png(0, 24, b""), "undecodable|truncated|too_small"),
    "short-pixels.png": (png(24, 24, bytes(99)), "truncated|undecodable"),
    "wrong-crc.png": (damaged(picture(17), 20), "undecodable|truncated"),
    "tiny.png": (picture(18, size=4), "too_small"),
    "archive.png": (tar(TWO), "undecodable"),
    "a.tar.part": (b"half a download", "not_an_image"),
    "no-suffix": (picture(19), "not_an_image"),
    "bad-caption.png": (picture(20), KEPT),
    "bad-caption.txt": (b"caf\xe9 \xff\xfe \x00", None),
    "README.md": (b"# mine", None),
    "Thumbs.db": (b"\xd0\xcf", None),
    "._good.png": (b"\x00\x05\x16\x07", None),
}

# files of many samples: name → (content, what becomes of its samples)
ARCHIVES: dict[str, tuple[Make, list[str]]] = {
    "empty.tar": (lambda: tar([]), []),
    "no-bytes.tar": (lambda: b"", ["truncated_tar"]),
    "zeros.tar": (lambda: bytes(10240), []),
    "text.tar": (lambda: b"<html>404</html>" * 99, ["truncated_tar"]),
    "half-member.tar": (lambda: tar(TWO)[: 512 + 1024 * 3], [KEPT, "truncated_tar"]),
    "no-marker.tar": (lambda: tar([("d.png", picture(5))])[:2560], [KEPT, "truncated_tar"]),
    "bad-header.tar": (
        lambda: damaged(tar([("e.png", picture(6)), ("f.png", picture(7))]), 2600),
        [KEPT, "truncated_tar"],
    ),
    "dots.tar": (
        lambda: tar([("../../evil.png", picture(30)), ("/etc/evil.png", picture(31))]),
        [KEPT, KEPT],
    ),
    "same-key.tar": (
        lambda: tar([("a.png", picture(32)), ("a.jpg", picture(33, "JPEG"))]),
        [KEPT, "second_image"],
    ),
    "same-name.tar": (
        lambda: tar([("a.png", picture(34)), ("a.png", picture(35))]),
        [KEPT, "second_image"],
    ),
    "text-only.tar": (
        lambda: tar([("a.txt", b"alone"), ("b.json", b"{}")]),
        ["no_image", "no_image"],
    ),
    "bad-json.tar": (lambda: tar([("a.png", picture(36)), ("a.json", b"{no")]), ["bad_metadata"]),
    "deep-json.tar": (
        lambda: tar([("a.png", picture(59)), ("a.json", b"[" * 100_000)]),
        ["bad_metadata"],
    ),
    "list-json.tar": (lambda: tar([("a.png", picture(37)), ("a.json", b"[1]")]), [KEPT]),
    "bad-text.tar": (lambda: tar([("a.png", picture(38)), ("a.txt", b"\xff\xfe\xfa")]), [KEPT]),
    "bad-name.tar": (
        lambda: tar([("caf\udce9.png", picture(39))], kind=tarfile.GNU_FORMAT),
        [KEPT],
    ),
    "nested.tar": (
        lambda: tar([("x/y.z/a.b.png", picture(40)), ("in.tar", tar(TWO))]),
        [KEPT, "no_image"],
    ),
    "link.tar": (lambda: special_tar(tarfile.SYMTYPE), [KEPT, "no_image"]),
    "device.tar": (lambda: special_tar(tarfile.CHRTYPE), [KEPT, "no_image"]),
    "large-member.tar": (large_member, [KEPT, "too_large", "truncated_tar"]),
    "half.tar.gz": (lambda: tar([("g.png", picture(41))], "w:gz")[:-9], [KEPT, "truncated_tar"]),
    "plain.tar.gz": (lambda: tar([("h.png", picture(42))]), ["truncated_tar"]),
    "crc.tar.gz": (
        lambda: damaged(gzip.compress(tar([("i.png", picture(43))])), -8),
        [KEPT, "truncated_tar"],
    ),
    "half.parquet": (lambda: parquet({"image": [picture(44)]})[:-40], ["torn_file"]),
    "no-bytes.parquet": (lambda: b"", ["torn_file"]),
    "text.parquet": (lambda: b"PAR1" + b"x" * 99 + b"PAR1", ["torn_file"]),
    "no-rows.parquet": (lambda: parquet({"image": pa.array([], pa.binary())}), []),
    "nulls.parquet": (
        lambda: parquet({"image": pa.array([picture(45), None])}),
        [KEPT, "no_image"],
    ),
    "empty-image.parquet": (lambda: parquet({"image": [b"", picture(46)]}), ["empty", KEPT]),
    "not-utf8.parquet": (not_utf8, [KEPT, "bad_metadata"]),
    "year-33658.parquet": (
        lambda: parquet(
            {
                "image": [picture(75), picture(76)],
                "caption": pa.array([10**12, 1], pa.timestamp("s")),
            }
        ),
        ["bad_metadata", KEPT],
    ),
    "bad-qa.parquet": (
        lambda: parquet({"image": [picture(47)], "qa": ["[1, 2]"]}),
        ["bad_metadata"],
    ),
    "half.arrow": (lambda: arrow([48, 49])[:-1200], [KEPT, "torn_file"]),
    "no-bytes.arrow": (lambda: b"", ["torn_file"]),
    "text.arrow": (lambda: b"ARROW1" + b"x" * 99, ["torn_file"]),
    "lists.jsonl": (lambda: b"[1]\nnull\n7\n", ["bad_metadata"] * 3),
    "binary.jsonl": (lambda: b"\xff\xfe\n\x00\n", ["bad_metadata"] * 2),
    "out.jsonl": (
        lambda: b'{"image": "../../../nowhere/x.png"}\n{"image": "a\\u0000b"}\n',
        ["missing", "unreadable"],
    ),
    "self.jsonl": (lambda: b'{"image": "."}\n{"url": "nope://x"}\n', ["unreadable", "unreadable"]),
    "deep.jsonl": (lambda: b"[" * 100_000 + b"\n", ["bad_metadata"]),
}
CLEAR_ERRORS: dict[str, tuple[Make, str]] = {
    "two-columns.parquet": (
        lambda: parquet(pa.Table.from_arrays([pa.array([picture(77)])] * 2, ["image", "image"])),
        r"has 2 columns 'image'",
    ),
    "no-column.parquet": (
        lambda: parquet({"url": ["http://x"]}),
        r"has no column 'image'.*columns are url",
    ),
    "numbers.parquet": (lambda: parquet({"image": [1, 2]}), r"expected encoded image bytes"),
    "metadata.parquet": (
        lambda: parquet(hugging("{half")),
        r"metadata `huggingface` .* cannot be read",
    ),
    "notes.docx": (lambda: b"PK", r"neither a folder nor"),
}


def outcomes(source: str, scratch: Path) -> list[tuple[str, str]]:
    """(key, what becomes of it) of everything in a source; the bytes of each sample are found
    again.
    """
    index = IndexGroup(str(scratch), CorpusSection())
    found: list[tuple[str, str]] = []
    for group in find_groups(source, CorpusSection(), 0):
        came = list(group.samples())
        found += [(one.key, index.row(one).get("reason") or KEPT) for one in came]
        samples = [one for one in came if isinstance(one, Sample)]
        if samples:
            with group.reader() as read:
                assert [read(one.locator) for one in samples] == [one.data for one in samples]
    return found


def test_each_file_of_a_folder_is_kept_or_counted_with_its_reason(tmp_path: Path) -> None:
    """A duplicate is only seen by the corpus."""
    (tmp_path / "in").mkdir()
    for name, (data, _) in FILES.items():
        (tmp_path / "in" / name).write_bytes(data)
    found = outcomes(str(tmp_path / "in"), tmp_path)
    expected = {name: fate for name, (_, fate) in FILES.items() if fate is not None} | {
        "twice.png": KEPT
    }
    assert sorted(key for key, _ in found) == sorted(expected)
    assert {key: fate for key, fate in found if fate not in expected[key].split("|")} == {}


@pytest.mark.parametrize("name", ARCHIVES)
def test_each_sample_of_a_broken_file_is_kept_or_counted_with_its_reason(
    name: str, tmp_path: Path
) -> None:
    make, expected = ARCHIVES[name]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(make())
    assert Counter(fate for _, fate in outcomes(str(folder / name), tmp_path)) == Counter(expected)
    assert [path.name for path in folder.iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", CLEAR_ERRORS)
def test_what_cannot_be_a_source_is_one_clear_error(name: str, tmp_path: Path) -> None:
    make, message = CLEAR_ERRORS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError, match=message):
        list(find_groups(str(tmp_path / name), CorpusSection(), 0))


@pytest.mark.ray
def test_a_corpus_of_all_of_them_keeps_or_counts_everything(tmp_path: Path) -> None:
    """On Ray; and somebody's files in the place of the corpus are an error before any work."""
    (tmp_path / "in").mkdir()
    (tmp_path / "archives").mkdir()
    for name, (data, _) in FILES.items():
        (tmp_path / "in" / name).write_bytes(data)
    for name, (make, _) in ARCHIVES.items():
        (tmp_path / "archives" / name).write_bytes(make())
    source = [str(tmp_path / "in"), *(str(tmp_path / "archives" / name) for name in ARCHIVES)]
    given = {"source": source, "val_fraction": 0.2, "shard_images": 7}
    recipe = Recipe.model_validate(
        {
            "out": str(tmp_path / "out"),
            "tracking": {"uri": "off"},
            "resources": {"readers": 1},
            "corpus": given,
        }
    )
    (tmp_path / "out" / "corpus").mkdir(parents=True)
    (tmp_path / "out" / "corpus" / "half.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match=r"holds files that are no artifact \(half\.parquet\)"):
        corpus.run(recipe)
    (tmp_path / "out" / "corpus" / "half.parquet").unlink()
    counts = corpus.run(recipe).counts
    fates = Counter(fate for _, expected in ARCHIVES.values() for fate in expected)
    fates.update(fate for _, fate in FILES.values() if fate is not None and "|" not in fate)
    total = sum(fate is not None for _, fate in FILES.values()) + sum(
        len(fates) for _, fates in ARCHIVES.values()
    )
    assert counts["images"] + counts["quarantined"] == counts["found"] == total
    assert counts["images"] == fates.pop(KEPT)
    assert all(counts[f"quarantined/{reason}"] >= number for reason, number in fates.items())
    path = str(tmp_path / "out" / "corpus")
    rows = {
        split: sum(len(shards.read_shard(path, key)) for key in shards.list_shards(path, split))
        for split in SPLITS
    }
    assert rows == {
        "train": counts["train"],
        "val": counts["val"],
        "quarantine": counts["quarantined"],
    }
    assert len(FILES) + len(ARCHIVES) + len(CLEAR_ERRORS) >= 50
