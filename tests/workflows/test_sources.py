"""Sources are detected by what a path holds, also on an object store."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalti.errors import DataError
from smalti.workflows.sources import detect, find_groups
from tests.workflows.sources.written import SECTION, collect, picture, write_tar


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
