"""Finished shards are found; damaged, outdated and foreign ones are not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from smalti import shards
from smalti.errors import DataError
from smalti.workflows.pipeline.finished_shards import (
    finished_receipt,
    matching_receipt,
    refuse_foreign,
)


def test_finished_shards_and_torn_ones(tmp_path: Path) -> None:
    assert finished_receipt(str(tmp_path), "train/00000") is None
    receipt = shards.write_shard(str(tmp_path), "train/00000", pa.table({"a": [1, 2]}))
    assert finished_receipt(str(tmp_path), "train/00000") == receipt
    path = tmp_path / "train" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:20])
    assert finished_receipt(str(tmp_path), "train/00000") is None
    assert not path.exists()
    with pytest.raises(DataError):
        shards.shard_rows(str(tmp_path), "train/00000")


def test_a_shard_of_other_images_is_made_again(tmp_path: Path) -> None:
    corpus, out, key = str(tmp_path / "corpus"), str(tmp_path / "out"), "train/00000"
    shards.write_shard(corpus, key, pa.table({"image_id": ["a", "b"]}))
    receipt = shards.write_shard(out, key, pa.table({"image_id": ["a", "a", "b", "b"]}))
    assert matching_receipt(out, corpus, key) == receipt
    for other in (
        {"image_id": ["b", "a"]},
        {"image_id": ["a"]},
        {"image_id": ["a", "b", "c"]},
        {"what": [1, 2]},
    ):
        shards.write_shard(out, key, pa.table(other))
        assert matching_receipt(out, corpus, key) is None
        assert not (tmp_path / "out" / "train" / "00000.parquet").exists()
    assert matching_receipt(out, corpus, key) is None


def test_shards_that_the_corpus_lacks_are_refused(tmp_path: Path) -> None:
    refuse_foreign(str(tmp_path), ["train/00000"])
    shards.write_shard(str(tmp_path), "train/00000", pa.table({"a": [1]}))
    (tmp_path / "train" / "00001.parquet.tmp").write_bytes(b"half")
    refuse_foreign(str(tmp_path), ["train/00000", "train/00001"])
    with pytest.raises(
        DataError, match=r"1 shards that are not in the corpus.*train/00000\.parquet"
    ):
        refuse_foreign(str(tmp_path), ["train/00001"])
