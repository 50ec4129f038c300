"""Layouts of published sets: img2dataset's three, Arrow and saved datasets, JSON lines, and servers
of every kind.

Covers: workflows/sources/arrow.py.
"""

from __future__ import annotations

import http.server
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources import Sample, Unusable, detect, find_groups


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 7, 7)).save(stream, "JPEG")
    return stream.getvalue()


def collect(source: str, **section: object) -> tuple[list[Sample], list[Unusable]]:
    """Everything a source gives; each sample's bytes are read again and must be the same."""
    samples: list[Sample] = []
    lost: list[Unusable] = []
    for group in find_groups(source, CorpusSection.model_validate(section), 0):
        found = list(group.samples())
        mine = [one for one in found if isinstance(one, Sample)]
        with group.reader() as read:
            assert all(read(one.locator) == one.data for one in mine)
        samples += mine
        lost += [one for one in found if isinstance(one, Unusable)]
    return samples, lost


def write_tar(path: Path, numbers: list[int]) -> None:
    """A tar as img2dataset writes it: jpg, json and txt of each image."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            said = {
                "caption": f"c{number}",
                "url": "http://x",
                "key": f"{number:09d}",
                "status": "success",
            }
            texts = {"txt": f"c{number}".encode(), "json": json.dumps(said).encode()}
            for name, data in {"jpg": picture(number), **texts}.items():
                info = tarfile.TarInfo(f"{number:09d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_tables(folder: Path, shard: str) -> None:
    """What img2dataset writes beside its shards."""
    folder.mkdir(exist_ok=True)
    table = pa.table({"url": ["http://x"], "caption": ["c"], "key": ["0"], "status": ["success"]})
    pq.write_table(table, folder / f"{shard}.parquet")
    (folder / f"{shard}_stats.json").write_text("{}")


def test_img2dataset_tars_with_their_tables_beside(tmp_path: Path) -> None:
    for shard in range(2):
        write_tables(tmp_path, f"{shard:05d}")
        write_tar(tmp_path / f"{shard:05d}.tar", [2 * shard, 2 * shard + 1])
    samples, lost = collect(str(tmp_path))
    assert [(one.key, one.caption) for one in samples] == [(f"{n:09d}", f"c{n}") for n in range(4)]
    assert not lost


def test_img2dataset_files_in_folders(tmp_path: Path) -> None:
    for shard in range(2):
        write_tables(tmp_path, f"{shard:05d}")
        folder = tmp_path / f"{shard:05d}"
        folder.mkdir()
        (folder / f"{shard:05d}0000.jpg").write_bytes(picture(shard))
        (folder / f"{shard:05d}0000.txt").write_text(f"c{shard}")
        (folder / f"{shard:05d}0000.json").write_text("{}")
    samples, lost = collect(str(tmp_path))
    assert sorted((one.caption, one.label) for one in samples) == [("c0", None), ("c1", None)]
    assert not lost


def test_a_table_of_images_beside_a_folder_of_its_name_is_data(tmp_path: Path) -> None:
    """Only img2dataset's own tables are none: told by its statistics, or by its columns where those
    are gone.
    """
    (tmp_path / "more").mkdir()
    pq.write_table(
        pa.table({"image": [picture(0)], "caption": ["data"]}), tmp_path / "more.parquet"
    )
    (tmp_path / "more" / "readme.txt").write_text("no image")
    assert [one.caption for one in collect(str(tmp_path))[0]] == ["data"]
    write_tables(tmp_path, "00000")
    write_tar(tmp_path / "00000.tar", [1])
    with pytest.raises(DataError, match=r"several kinds of data \(parquet, webdataset\)"):
        collect(str(tmp_path))
    (tmp_path / "more.parquet").unlink()
    (tmp_path / "00000_stats.json").unlink()
    samples, lost = collect(str(tmp_path))
    assert ([one.caption for one in samples], lost) == (["c1"], [])


def test_img2dataset_parquet(tmp_path: Path) -> None:
    jpg = pa.array([picture(1), None], pa.binary())
    status = ["success", "failed_to_download"]
    pq.write_table(
        pa.table({"jpg": jpg, "caption": ["a", "b"], "key": ["0", "1"], "status": status}),
        tmp_path / "00000.parquet",
    )
    (tmp_path / "00000_stats.json").write_text("{}")
    samples, lost = collect(str(tmp_path))
    assert [one.caption for one in samples] == ["a"]
    assert [one.reason for one in lost] == ["no_image"]


def write_arrow(path: Path, numbers: list[int], kind: str) -> None:
    image = pa.array([{"bytes": picture(number), "path": None} for number in numbers])
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table(
        {"image": image, "text": [f"t{n}" for n in numbers], "label": [n % 2 for n in numbers]}
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files(tmp_path: Path, kind: str) -> None:
    write_arrow(tmp_path / "x.arrow", [0, 1, 2, 3, 4], kind)
    samples, lost = collect(str(tmp_path / "x.arrow"))
    assert [(one.key, one.caption, one.label) for one in samples] == [
        (str(n), f"t{n}", ("cat", "dog")[n % 2]) for n in range(5)
    ]
    assert not lost
    whole = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(whole[: len(whole) // 2] if kind == "stream" else b"nothing")
    samples, lost = collect(str(tmp_path / "x.arrow"))
    assert len(samples) < 5
    assert [one.reason for one in lost] == ["torn_file"]


def test_a_saved_dataset_gives_what_it_lists(tmp_path: Path) -> None:
    train = tmp_path / "train"
    train.mkdir()
    for number in range(2):
        write_arrow(train / f"data-{number:05d}-of-00002.arrow", [number], "stream")
    write_arrow(train / "cache-1234.arrow", [7], "stream")
    names = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (train / "state.json").write_text(json.dumps({"_data_files": names}))
    (train / "dataset_info.json").write_text("{}")
    assert [one.caption for one in collect(str(train))[0]] == ["t0", "t1"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits train, test\. Name one: .*/train"):
        collect(str(tmp_path))
    for broken in ("{", '["train"]', "{}", '{"splits": []}', '{"splits": 3}'):
        (tmp_path / "dataset_dict.json").write_text(broken)
        with pytest.raises(DataError, match=r"holds the splits .*Name one: .*/train"):
            collect(str(tmp_path))


def test_json_lines_name_images(tmp_path: Path, memory_url: str) -> None:
    import fsspec

    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(picture(number))
    fsspec.filesystem("memory").pipe_file("/smalti-test/3.jpg", picture(3))
    rows = [
        {"image": "pictures/0.jpg", "caption": "zero", "label": "x", "qa": [["q", "a"]]},
        {"file_name": str(tmp_path / "pictures" / "1.jpg"), "text": "one"},
        {"image": "gone.jpg"},
        {"caption": "whose?"},
        {"url": f"{memory_url}/3.jpg", "question": "?", "answer": "!"},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*lines, b"{no json", b"\xff\xfe", b""]))
    samples, lost = collect(str(tmp_path / "x.jsonl"), shard_images=2)
    assert [(one.key, one.caption, one.label, one.qa) for one in samples] == [
        ("1", "zero", "x", (("q", "a"),)),
        ("2", "one", None, ()),
        ("5", None, None, (("?", "!"),)),
    ]
    assert [(one.key, one.reason) for one in lost] == [
        ("3", "missing"),
        ("4", "bad_metadata"),
        ("6", "bad_metadata"),
        ("7", "bad_metadata"),
    ]
    assert detect("x/y.jsonl") == "jsonl"
    named = collect(str(tmp_path / "x.jsonl"), caption_column="caption_en")[0]
    assert [one.caption for one in named] == [None] * 3, (
        "a column that is named is not skipped for another"
    )


class Ranged(http.server.SimpleHTTPRequestHandler):
    """A quiet file server that knows byte ranges."""

    ranges = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if not wanted or not self.ranges:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        self.wfile.write(data[start : end + 1])
        return None

    def end_headers(self) -> None:
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


class Plain(Ranged):
    """A file server that does not."""

    ranges = False


@pytest.fixture(params=[Ranged, Plain])
def server(request: pytest.FixtureRequest, serve: Callable[..., str]) -> str:
    return serve(request.param)


def test_sources_on_a_server(server: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    write_tar(tmp_path / "00000.tar", [0, 1])
    write_tar(tmp_path / "00001.tar", [2])
    assert [one.caption for one in collect(server + "/{00000..00001}.tar")[0]] == ["c0", "c1", "c2"]
    pq.write_table(pa.table({"image": [picture(n) for n in range(3)]}), tmp_path / "x.parquet")
    assert len(collect(server + "/x.parquet")[0]) == 3
    write_arrow(tmp_path / "x.arrow", [0, 1], "stream")
    assert len(collect(server + "/x.arrow")[0]) == 2
    (tmp_path / "0.jpg").write_bytes(picture(0))
    (tmp_path / "x.jsonl").write_text('{"image": "0.jpg"}')
    assert len(collect(server + "/x.jsonl")[0]) == 1
    with pytest.raises(DataError, match="nothing found at"):
        collect(server + "/nowhere.tar")


@pytest.mark.parametrize(
    "source", ["nothing://bucket/a.tar", "nothing://bucket/pictures", "nothing://bucket/a.jsonl"]
)
def test_a_scheme_that_nothing_reads_is_one_clear_error(source: str) -> None:
    with pytest.raises(DataError, match="nothing://bucket"):
        list(find_groups(source, CorpusSection(), 0))
