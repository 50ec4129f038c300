"""Storage on a local disk and in an object store.

Covers: smalti/filesystems.py, smalti/paths.py.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from smalti import storage
from smalti.errors import DataError
from smalti.filesystems import explained
from smalti.paths import temp_name


@pytest.mark.parametrize(
    ("root", "parts", "whole"),
    [
        ("/a", ("b", "c.txt"), "/a/b/c.txt"),
        ("/a/", ("b/",), "/a/b"),
        ("a", (), "a"),
        ("", ("a", "b"), "a/b"),
        ("/", ("a",), "/a"),
        ("s3://bucket/x", ("train/00001", ""), "s3://bucket/x/train/00001"),
        ("memory://", ("a",), "memory://a"),
    ],
)
def test_join(root: str, parts: tuple[str, ...], whole: str) -> None:
    assert storage.join(root, *parts) == whole


def test_parent_of_paths_and_urls() -> None:
    assert storage.parent("/a/b") == "/a"
    assert storage.parent("b") == ""
    assert storage.parent("s3://bucket/a/b") == "s3://bucket/a"


def test_a_file_written_is_read_back_listed_and_removed(place: str) -> None:
    assert not storage.exists(place)
    assert storage.list_names(place) == []
    path = storage.join(place, "deep", "x.bin")
    storage.write_atomic(path, b"abc")
    storage.write_atomic(storage.join(place, "deep", "y.json"), memoryview(b"{}"))
    assert storage.read_bytes(path) == b"abc"
    assert storage.size_bytes(path) == 3
    assert storage.is_dir(storage.join(place, "deep"))
    assert not storage.is_dir(path)
    assert storage.list_names(place) == ["deep"]
    assert storage.list_names(storage.join(place, "deep")) == ["x.bin", "y.json"]
    assert storage.list_names(storage.join(place, "deep"), ".json") == ["y.json"]
    with storage.open_read(path) as file:
        file.seek(1)
        assert file.read() == b"bc"
    storage.write_atomic(path, b"again")
    assert storage.read_bytes(path) == b"again"
    storage.remove(path)
    assert not storage.exists(path)
    storage.remove(path)  # nothing there is fine
    storage.remove(place)
    assert not storage.exists(place)


def test_json_keeps_its_value_and_refuses_nan(place: str) -> None:
    path = storage.join(place, "a.json")
    storage.write_json(path, {"ü": [1, 2.5, None]})
    assert storage.read_json(path) == {"ü": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(path, {"loss": float("nan")})
    storage.write_atomic(path, b'{"torn": ')
    with pytest.raises(DataError, match=r"a\.json is not valid JSON"):
        storage.read_json(path)


def test_missing_files_say_so(place: str) -> None:
    path = storage.join(place, "none.bin")
    for read in (storage.read_bytes, storage.open_read, storage.size_bytes):
        with pytest.raises(DataError, match=r"none\.bin.*nothing exists at that path"):
            read(path)
    with (
        pytest.raises(DataError, match="nothing exists at that path"),
        storage.local_copy(str(path)) as _,
    ):
        pass


def test_a_write_that_fails_leaves_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "x.bin")
    storage.write_atomic(path, b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full: free some space"):
        storage.write_atomic(path, b"after")
    assert storage.read_bytes(path) == b"before"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    with (
        pytest.raises(DataError, match="disk is full"),
        explained("write", str(link)),
        open(link, "wb", 0) as file,
    ):
        file.write(b"x")


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/x"):
        storage.write_atomic(str(tmp_path / "file" / "x"), b"")


def test_an_unwritable_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        with pytest.raises(DataError, match="cannot write /proc/none/x"):
            storage.write_atomic("/proc/none/x", b"")
        return
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="fix the permissions"):
        storage.write_atomic(str(tmp_path / "x"), b"")


def test_unknown_schemes_and_missing_clients() -> None:
    with pytest.raises(DataError, match="cannot reach nowhere://x"):
        storage.read_bytes("nowhere://x")


def fill_and_fail(place: str) -> None:
    with storage.atomic_local_dir(place) as folder:
        Path(folder, "b").write_bytes(b"2")
        raise DataError("half")


def test_a_folder_appears_whole_or_not_at_all(place: str) -> None:
    with storage.atomic_local_dir(place) as folder:
        os.makedirs(os.path.join(folder, "sub"))
        Path(folder, "sub", "a").write_bytes(b"1")
        assert not storage.exists(place)
    assert storage.read_bytes(storage.join(place, "sub", "a")) == b"1"
    with pytest.raises(DataError, match="half"):
        fill_and_fail(place)
    assert storage.list_names(place) == ["sub"]
    with storage.atomic_local_dir(place) as folder:
        Path(folder, "c").write_bytes(b"3")
    assert storage.list_names(place) == ["c"]
    assert storage.list_names(storage.parent(place)) == ["place"]


def test_local_copy_of_files_and_folders(place: str) -> None:
    storage.write_atomic(storage.join(place, "sub", "a"), b"1")
    with storage.local_copy(place) as folder:
        assert Path(folder, "sub", "a").read_bytes() == b"1"
    with storage.local_copy(storage.join(place, "sub", "a")) as file:
        assert Path(file).read_bytes() == b"1"
    if storage.is_local(place):
        with storage.local_copy(place) as folder:
            assert folder == place


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    storage.write_atomic(f"file://{tmp_path}/a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert storage.absolute(f"file://{tmp_path}/a") == str(tmp_path / "a")
    assert storage.absolute("s3://b/a") == "s3://b/a"


def test_temporary_names_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / temp_name("x").lstrip("/")).write_text("")
    (tmp_path / "x").write_text("")
    assert storage.list_names(str(tmp_path)) == ["x"]


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    for path in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(DataError, match="a file is where a folder is needed"):
            storage.make_dirs(str(path))


def test_files_are_brought_fetched_and_measured(place: str, tmp_path: Path) -> None:
    """A stamp changes with the file; the sizes are of whole files, in all folders below."""
    assert storage.sizes_bytes(place) == {}
    stamps = []
    for text in (b"one", b"four"):
        source = tmp_path / "source"
        source.write_bytes(text)
        storage.put_file(str(source), storage.join(place, "a/b"))
        stamps.append(storage.stamp(storage.join(place, "a/b")))
    assert stamps[0] != stamps[1] == storage.stamp(storage.join(place, "a/b"))
    storage.write_atomic(storage.join(place, "c"), b"")
    assert storage.sizes_bytes(place) == {"a/b": 4, "c": 0}
    storage.get_file(storage.join(place, "a/b"), str(tmp_path / "fetched"))
    assert (tmp_path / "fetched").read_bytes() == b"four"
    for missing in (storage.stamp, lambda path: storage.get_file(path, str(tmp_path / "no"))):
        with pytest.raises(DataError, match="nothing there"):
            missing(storage.join(place, "nothing there"))


def test_objects_that_stand_for_folders_are_no_files(memory_url: str) -> None:
    """On S3 Ray Train writes them: empty, with names that end with a slash."""
    fs, key = fsspec.core.url_to_fs(memory_url)
    marks = {f"{key}/{name}": MemoryFile(fs, f"{key}/{name}", b"") for name in ("", "sub/")}
    fs.store.update(marks)
    storage.write_atomic(storage.join(memory_url, "sub", "a"), b"1")
    assert storage.sizes_bytes(memory_url) == {"sub/a": 1}
    assert storage.list_names(memory_url) == ["sub"] and storage.list_names(
        f"{memory_url}/sub"
    ) == ["a"]
    with storage.local_copy(memory_url) as folder:
        assert Path(folder, "sub", "a").read_bytes() == b"1"
    for mark in marks:  # this store cannot remove them
        del fs.store[mark]
