"""Metadata files of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smalti.errors import DataError
from smalti.schema import CorpusSection
from tests.workflows.sources.written import collect, picture


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
