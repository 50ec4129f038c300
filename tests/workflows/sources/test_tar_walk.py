"""Tars that are truncated, damaged or not tars."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.workflows.sources.written import collect, picture, write_tar


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
