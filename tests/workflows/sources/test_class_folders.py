"""Folders: captions beside images, labels by folder, and a mixed order.

Covers: workflows/sources/folder.py.
"""

from __future__ import annotations

from pathlib import Path

from tests.workflows.sources.written import collect, picture


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


def test_folder_order_mixes_classes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.png").write_bytes(picture(number))
    labels = [one.label for one in collect(str(tmp_path))[0]]
    assert labels != sorted(label for label in labels if label)
    assert 5 <= labels[:20].count("a") <= 15
    assert labels == [one.label for one in collect(str(tmp_path))[0]]
