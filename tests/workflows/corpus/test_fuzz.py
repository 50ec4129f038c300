"""Bad input of every kind: each thing found ends in an output row, a quarantine row, or one clear
error before any work.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalti import shards
from smalti.artifact import Artifact
from smalti.errors import SmaltiError
from smalti.schema import Recipe
from smalti.workflows.corpus import stage as corpus


def picture(number: int, size: tuple[int, int] = (24, 24), kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def palette_png(transparencies: int) -> bytes:
    """A PNG of 24 x 24 with a palette of two colours and so many bytes of transparency."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 24, 24, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(6)),
        (b"tRNS", bytes(transparencies)),
    ]
    parts += [(b"IDAT", zlib.compress(bytes(24 * 25))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def run(out: Path, source: str | list[str], **section: Any) -> Artifact:
    given = {"source": source, "val_fraction": 0.0, **section}
    return corpus.run(
        Recipe.model_validate({"out": str(out), "tracking": {"uri": "off"}, "corpus": given})
    )


def check_sum(made: Artifact, found: int) -> dict[str, str]:
    """Every thing is kept or quarantined; key → reason of what is lost."""
    kept = sum(shards.shard_rows(made.path, key) for key in shards.list_shards(made.path))
    lost = [
        row
        for key in shards.list_shards(made.path, "quarantine")
        for row in shards.read_shard(made.path, key).to_pylist()
    ]
    assert kept + len(lost) == made.counts["found"] == found
    return {row["key"]: row["reason"] for row in lost}


JPEG, PNG, WEBP = picture(1, (64, 64), "JPEG"), picture(2, (64, 64)), picture(3, (64, 64), "WEBP")
FILES: dict[str, tuple[bytes, str | None]] = {  # name → bytes, and the reason why it is lost (None: kept; "": any)
    "zero.png": (b"", "empty"),
    "zero.jpg": (b"", "empty"),
    **{f"cut{n}.jpg": (JPEG[: len(JPEG) * n // 10], "") for n in (1, 3, 5, 9)},
    **{f"cut{n}.png": (PNG[: len(PNG) * n // 10], "") for n in (1, 3, 5, 9)},
    **{f"cut{n}.webp": (WEBP[: len(WEBP) * n // 10], "") for n in (1, 5, 9)},
    "zeros.jpg": (bytes(5000), "undecodable"),
    "ones.png": (b"\xff" * 5000, "undecodable"),
    "text.jpg": (b"I am text", "undecodable"),
    "page.png": (b"<!doctype html><h1>403</h1>", "undecodable"),
    "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "undecodable"),
    "pdf.jpg": (b"%PDF-1.7\n%\xe2\xe3", "undecodable"),
    "zip.png": (b"PK\x03\x04" + bytes(99), "undecodable"),
    "header.png": (PNG[:8], ""),
    "half-written.png": (PNG[:4000] + bytes(len(PNG) - 4000), ""),
    "tiny.png": (picture(4, (3, 3)), "too_small"),
    "line.png": (picture(5, (200, 10)), "aspect"),
    "wide.png": (picture(6, (200, 10)), "aspect"),
    "large.png": (picture(7, (200, 200)), "too_large"),
    "bomb.bmp": (b"BM" + (26).to_bytes(4, "little") + bytes(4) + (26).to_bytes(4, "little")
                 + (12).to_bytes(4, "little") + (60000).to_bytes(2, "little") * 2 + b"\1\0\x18\0", "bomb"),
    "palette.png": (palette_png(300), "undecodable"),
    "palette of two.png": (palette_png(2), None),
    "png-as.jpg": (picture(8), None),
    "webp-as.png": (picture(9, kind="WEBP"), None),
    "UPPER.PNG": (picture(10), None),
    "name with spaces, and comma.png": (picture(11), None),
    "notes.docx": (b"PK", "not_an_image"),
    "film.mp4": (b"x", "not_an_image"),
    "shard.parquet.part": (b"PAR1", "not_an_image"),
    "model.bin": (b"x", "not_an_image"),
}  # fmt: skip


def test_a_folder_of_damaged_files(inline: None, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, (data, _) in FILES.items():
        (source / name).write_bytes(data)
    (source / "png-as.txt").write_bytes(b"caf\xe9 \xff\xfe")
    (source / ".x.png.smalti-tmp").write_bytes(b"half")
    made = run(
        tmp_path / "out",
        str(source),
        format="folder",
        max_bytes=100_000,
        max_aspect=10,
        max_pixels=10**6,
    )
    reasons = check_sum(made, len(FILES))
    for name, (_, reason) in FILES.items():
        assert (name in reasons) == (reason is not None), name
        assert reason is None or reasons[name] == reason or not reason, (name, reasons[name])


def several_kinds(folder: Path) -> str:
    (folder / "a.png").write_bytes(picture(1))
    (folder / "x.tar").write_bytes(b"")
    return str(folder)


def no_image_column(folder: Path) -> str:
    pq.write_table(pa.table({"vector": [1.0]}), folder / "x.parquet")
    return str(folder)


def foreign_out(folder: Path) -> str:
    (folder.parent / "out" / "corpus").mkdir(parents=True)
    (folder.parent / "out" / "corpus" / "thesis.docx").write_bytes(b"x")
    (folder / "a.png").write_bytes(picture(1))
    return str(folder)


@pytest.mark.parametrize(
    "make",
    [
        several_kinds,
        no_image_column,
        foreign_out,
        lambda folder: str(folder / "gone"),
        lambda folder: str(folder / "{0..x}.tar"),
        lambda folder: str(folder / "*.parquet"),
        lambda folder: str(folder),
    ],
)
def test_what_cannot_be_used_at_all_is_one_clear_error(
    inline: None, tmp_path: Path, make: Callable[[Path], str]
) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(SmaltiError):
        run(tmp_path / "out", make(tmp_path / "in"))
    assert not shards.list_shards(str(tmp_path / "out" / "corpus"))
