"""Parquet files of several writers, and torn ones."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalti.errors import DataError
from smalti.schema import CorpusSection
from smalti.workflows.sources import find_groups
from tests.workflows.sources.written import SECTION, collect, picture


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
