"""Sources on stores and servers that do not always answer: retries, then one clear error, and no
image is lost.

Covers: workflows/sources/jsonl.py.
"""

from __future__ import annotations

import http.server
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from smalti import shards
from smalti.errors import DataError
from smalti.schema import CorpusSection, Recipe
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.corpus import write as corpus_write
from smalti.workflows.sources import Sample, Unusable, detect, find_groups, jsonl, network
from smalti.workflows.sources.webdataset import compression_of


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 0, 7)).save(stream, "PNG")
    return stream.getvalue()


def tar(numbers: range) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for number in numbers:
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(picture(number))
            file.addfile(info, io.BytesIO(picture(number)))
    return stream.getvalue()


class ShakyFile(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        Shaky.answer()
        return super().read(size)


class Shaky(MemoryFileSystem):
    """A store in which one call of `every` times out, as fsspec's own clients tell it: an OSError
    without a number.
    """

    protocol = "shaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    every, calls = 0, 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("shaky:/"))

    @classmethod
    def answer(cls) -> None:
        cls.calls += 1
        if cls.every and cls.calls % cls.every == 0:
            raise TimeoutError

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        return (
            ShakyFile(self.store[path].getvalue())
            if mode == "rb"
            else super()._open(path, mode, **more)
        )

    def info(self, path: str, **more: Any) -> Any:
        self.answer()
        return super().info(path, **more)

    def cat_file(self, path: str, *rest: Any, **more: Any) -> bytes:
        self.answer()
        return super().cat_file(path, *rest, **more)


fsspec.register_implementation("shaky", Shaky, clobber=True)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of the shaky store, filled in every layout; no pauses between the tries."""
    for module in (network, jsonl):
        monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0, 0.0))
    fs = Shaky()
    fs.pipe_file("/in/x.tar", tar(range(30)))
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": [picture(n) for n in range(30)]}), stream, row_group_size=10)
    fs.pipe_file("/in/x.parquet", stream.getvalue())
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, pa.schema([("image", pa.binary())])) as writer:
        writer.write_table(pa.table({"image": [picture(n) for n in range(30)]}), max_chunksize=10)
    fs.pipe_file("/in/x.arrow", stream.getvalue())
    for number in range(30):
        fs.pipe_file(f"/in/f/{number}.png", picture(number))
    fs.pipe_file("/in/x.jsonl", b"".join(b'{"image": "f/%d.png"}\n' % n for n in range(30)))
    yield "shaky://in"
    Shaky.every, Shaky.store = 0, {}


def collect(source: str) -> tuple[list[bytes], list[Unusable]]:
    samples, lost = [], []
    for group in find_groups(source, CorpusSection(), 0):
        for one in group.samples():
            (samples if isinstance(one, Sample) else lost).append(one)
    return sorted(one.data for one in samples), lost


LAYOUTS = ["x.tar", "x.parquet", "x.arrow", "x.jsonl", "f", "{x,x}.tar"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_answered_is_asked_again(store: str, layout: str) -> None:
    whole = collect(f"{store}/{layout}")
    Shaky.every = 3
    assert collect(f"{store}/{layout}") == whole and not whole[1] and len(whole[0]) >= 30


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_store_that_answers_no_more_is_one_clear_error_and_no_loss(
    store: str, layout: str
) -> None:
    """At the listing, and when the samples are read: no row of a good file comes as torn or
    missing.
    """
    groups = list(find_groups(f"{store}/{layout}", CorpusSection(), 0))
    Shaky.every = 1
    with pytest.raises(DataError, match=r"shaky://in.*nobody answers|shaky://in.* does not answer"):
        collect(f"{store}/{layout}")
    found = []
    with pytest.raises(DataError, match=r"shaky://in.*nobody answers|shaky://in.* does not answer"):
        found = [one for group in groups for one in group.samples()]
    assert not found


def test_a_file_that_is_not_there_is_not_asked_for_twice(store: str) -> None:
    with pytest.raises(DataError, match="nothing found at"):
        collect(f"{store}/gone.tar")
    Shaky().pipe_file("/in/y.jsonl", b'{"image": "f/1.png"}\n{"image": "gone.png"}\n')
    samples, lost = collect(f"{store}/y.jsonl")
    assert (len(samples), [(one.key, one.reason) for one in lost]) == (1, [("2", "missing")])


def test_a_list_of_images_that_nobody_answers_for_is_an_error_and_some_are_lost(
    store: str, tmp_path: Path
) -> None:
    lines = tmp_path / "x.jsonl"
    lines.write_text(
        "\n".join(json.dumps({"image": f"{store}/f/{number}.png"}) for number in range(25))
    )
    Shaky.every = 1
    with pytest.raises(
        DataError, match=rf"x\.jsonl names 20 unreachable images in a row; .* {store}/f/19\.png"
    ):
        collect(str(lines))
    lines.write_text("\n".join(lines.read_text().splitlines()[:19]))
    samples, lost = collect(str(lines))
    assert (samples, [one.reason for one in lost]) == ([], ["unreachable"] * 19)


def recipe(out: Path, source: str) -> Recipe:
    section = {"source": source, "val_fraction": 0.0, "shard_images": 10}
    return Recipe.model_validate({"out": str(out), "tracking": {"uri": "off"}, "corpus": section})


@pytest.mark.parametrize("layout", ["x.tar", "f"])
def test_a_store_that_goes_silent_in_the_second_pass_costs_no_first_pass(
    inline: None, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    wanted = recipe(tmp_path, f"{store}/{layout}")
    written = corpus_write.WriteShards.shard

    def shard(self: corpus_write.WriteShards, key: str, *parts: Any) -> Any:
        Shaky.every = int(key == "train/00001")
        return written(self, key, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_write.WriteShards, "shard", shard)
        with pytest.raises(DataError, match="does not answer"):
            corpus.run(wanted)
    Shaky.every = 0
    made = corpus.run(wanted)
    assert made.counts["train"] == 30
    assert made.scores["retried/kept"] >= 2, "the index and the first shard"


@pytest.mark.parametrize("how", ["gone", "other bytes"])
def test_one_image_of_a_list_that_vanishes_between_the_passes_is_lost_alone(
    inline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for number in range(25):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    lines = tmp_path / "x.jsonl"
    lines.write_text("\n".join(json.dumps({"image": f"{number}.png"}) for number in range(25)))
    written = corpus_write.WriteShards.shard

    def shard(self: corpus_write.WriteShards, key: str, *parts: Any) -> Any:
        if key == "train/00001":
            path = tmp_path / "13.png"
            path.unlink() if how == "gone" else path.write_bytes(picture(99))
        return written(self, key, *parts)

    monkeypatch.setattr(corpus_write.WriteShards, "shard", shard)
    made = corpus.run(recipe(tmp_path / "out", str(lines)))
    expected = {"images": 24, "train": 24, "quarantined": 1, "found": 25, "quarantined/vanished": 1}
    assert expected.items() <= made.counts.items()
    assert [shards.shard_rows(made.path, key) for key in shards.list_shards(made.path)] == [
        10,
        9,
        5,
    ]
    (lost,) = shards.read_shard(made.path, "quarantine/00000").to_pylist()
    assert (lost["source"], lost["key"], lost["reason"]) == (str(lines), "14", "vanished")


# ---- web servers ---------------------------------------------------------------------------------


class Moody(http.server.SimpleHTTPRequestHandler):
    """A file server that answers 503 to one request of three, always for `down.png`, and 404 where
    nothing is.
    """

    calls = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _served(self) -> bool:
        Moody.calls += 1
        if "down" in self.path or Moody.calls % 3 == 0:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return False
        return True

    def do_GET(self) -> None:
        if self._served():
            super().do_GET()

    def do_HEAD(self) -> None:
        if self._served():
            super().do_HEAD()


@pytest.fixture
def server(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    for module in (network, jsonl):
        monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0, 0.0))
    return serve(Moody)


def test_a_server_in_a_mood_and_a_signed_address(server: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "x.tar").write_bytes(tar(range(5)))
    (tmp_path / "0.png").write_bytes(picture(0))
    samples, lost = collect(f"{server}/x.tar?token=a/b*c")
    assert (len(samples), lost) == (5, [])
    (tmp_path / "x.jsonl").write_text(
        "\n".join(f'{{"image": "{name}.png"}}' for name in ("0", "down", "gone"))
    )
    samples, lost = collect(f"{server}/x.jsonl")
    assert (len(samples), [one.reason for one in lost]) == (1, ["unreachable", "missing"])


def test_the_query_of_an_address_is_no_part_of_the_name() -> None:
    assert (
        detect("https://h/a.tar?token=1") == "webdataset"
        and detect("https://h/a.jsonl?x=.tar") == "jsonl"
    )
    assert compression_of("https://h/a.tar.gz?token=1") == "gzip" == compression_of("a.tgz")
