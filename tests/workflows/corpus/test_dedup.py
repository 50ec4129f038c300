"""Duplicates by a shuffle over files: as one dictionary of all ids would find them, for any number
of buckets.

Covers: workflows/corpus/index.py, workflows/corpus/layout.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from smalti import shards
from smalti.workflows.corpus import dedup
from smalti.workflows.corpus import index as corpus_index
from smalti.workflows.corpus.dedup import (
    DUPLICATE,
    MERGED,
    FindDuplicates,
    MarkGroups,
    Place,
    marks_key,
)
from smalti.workflows.corpus.index import (
    INDEX,
    halves,
    ids_of,
    ids_path,
    read_ids,
    read_rows,
    write_ids,
)
from smalti.workflows.corpus.layout import is_held_out


def identity(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def write_group(
    path: str, place: Place, numbers: list[int], questions: list[str] | None = None
) -> None:
    """An index and ids whose rows are `numbers`; negative ones are lost."""
    rows = [
        {
            "key": f"k{row}",
            "image_id": identity(number),
            "qa": [{"question": questions[row], "answer": "a"}],
        }
        if questions
        else {
            "key": f"k{row}",
            **({"image_id": identity(number)} if number >= 0 else {"reason": "empty"}),
        }
        for row, number in enumerate(numbers)
    ]
    table = pa.Table.from_pylist(rows, INDEX)
    write_ids(ids_path(path, place.split, place.number), [ids_of(table, 0)])
    shards.write_shard(path, f"index/{place.split}/{place.number:05d}", table)


def marks_of(
    path: str, places: list[Place], fraction: float | None = None
) -> dict[Place, list[dict[str, object]]]:
    ranges = dedup.buckets(sum(1000 for _ in places))
    finder = FindDuplicates(path, places)
    for item in reversed(ranges):
        finder.work(item)
    marker = MarkGroups(path, places, ranges, fraction)
    for item in dedup.spans(len(places)):
        marker.work(item)
    return {
        one: shards.read_shard(path, marks_key(one.split, one.number)).to_pylist() for one in places
    }


@pytest.mark.parametrize("ids_a_bucket", [10, 400, 10**6])
def test_the_first_of_equal_images_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids_a_bucket: int
) -> None:
    monkeypatch.setattr(dedup, "IDS_A_BUCKET", ids_a_bucket)
    monkeypatch.setattr(dedup, "GROUPS_A_SPAN", 2)
    rng = np.random.default_rng(0)
    places = [Place("val", 0, "v"), *(Place("train", n, f"t{n}") for n in range(4))]
    drawn = {place: rng.integers(-5, 80, 40).tolist() for place in places}
    for place, numbers in drawn.items():
        write_group(str(tmp_path), place, numbers)
    seen: dict[int, str] = {}
    made = marks_of(str(tmp_path), places)
    for place, numbers in drawn.items():
        for row, (number, mark) in enumerate(zip(numbers, made[place], strict=True)):
            if number < 0:
                assert mark["mark"] == dedup.UNUSABLE
            elif number in seen:
                assert (mark["mark"], mark["first"]) == (DUPLICATE, seen[number])
            else:
                seen[number] = f"{place.source}::k{row}"
                assert mark["mark"] == (dedup.VAL if place.split == "val" else dedup.TRAIN)


def test_rows_of_one_image_give_their_questions_to_the_first(tmp_path: Path) -> None:
    """Within a group and across groups of one source; not from training to held-out; what is not
    new is a duplicate.
    """
    places = [Place("val", 0, "v"), Place("train", 0, "t"), Place("train", 1, "t")]
    write_group(str(tmp_path), places[0], [1], ["q0"])
    write_group(str(tmp_path), places[1], [2, 2, 2, 1], ["q1", "q2", "q1", "q9"])
    write_group(str(tmp_path), places[2], [2, 3], ["q3", "q4"])
    made = marks_of(str(tmp_path), places)
    assert [row["mark"] for row in made[places[1]]] == [dedup.TRAIN, MERGED, DUPLICATE, DUPLICATE]
    assert [row["mark"] for row in made[places[2]]] == [MERGED, dedup.TRAIN]
    assert made[places[0]][0]["qa"] is None
    qa = made[places[1]][0]["qa"]
    assert isinstance(qa, list)
    assert [pair["question"] for pair in qa] == ["q1", "q2", "q3"]


def test_the_split_by_hash_is_the_same_for_numbers_and_digits() -> None:
    names = [identity(number) for number in range(500)] + ["0" * 32, "f" * 32]
    for fraction in (0.0, 0.02, 0.5, 1.0):
        found = dedup.held_out(halves(names)[:, 0], fraction).tolist()
        assert found == [is_held_out(name, fraction) for name in names]


@pytest.mark.parametrize("ids_a_batch", [1, 50, 1024])
def test_ids_are_read_by_prefix_and_rows_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids_a_batch: int
) -> None:
    monkeypatch.setattr(corpus_index, "IDS_A_BATCH", ids_a_batch)
    place = Place("train", 0, "t")
    write_group(str(tmp_path), place, list(range(300)))
    path = ids_path(str(tmp_path), "train", 0)
    half = read_ids(path, 0, 64)["high"].to_numpy()
    assert half.max() < 2**63 and (np.diff(half.astype(np.float64)) >= 0).all()
    assert len(half) + len(read_ids(path, 64, 128)) == 300
    assert sum(len(read_ids(path, number, number + 1)) for number in range(128)) == 300
    rows = np.array([3, 4, 250])
    assert read_rows(str(tmp_path), "train", 0, rows, ["key"])["key"].to_pylist() == [
        "k3",
        "k4",
        "k250",
    ]
