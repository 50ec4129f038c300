"""The stage codebook on 5,000 planted vectors: SIGKILL at every phase, bad shards, its settings.

Covers: workflows/codebook/build.py, tokenizers/codebook.py, workflows/codebook/recall.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

import smalti
from smalti import shards
from smalti.artifact import RECORD, Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import Recipe
from smalti.tokenizers.code_index import CodeIndex
from smalti.tokenizers.codebook import TREE, load_centroids
from smalti.tracking import NullTracker
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.codebook import cell_files, cell_ranges, partial_sums, passes, recall
from smalti.workflows.codebook import duplicates as distinct
from smalti.workflows.codebook import stage as codebook
from smalti.workflows.codebook.build import CodebookBuild
from smalti.workflows.codebook.tree import Tree, placed
from smalti.workflows.pipeline.stage import StageRun, run_stage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("on_ray")]

SHARDS, ROWS, DIM = 10, 500, 8
MOMENTS = (
    "sample/train/*.parquet",
    "coarse-001.safetensors",
    "cells/*.npy",
    "codes/*.npy",
    "polish-000.safetensors",
)
CHILD = """
import sys
from smalti.schema import Recipe
from smalti.workflows.codebook import passes, stage
passes.CHUNK_VECTORS = 1_000
stage.run(Recipe.model_validate_json(sys.argv[1]))
"""


def recipe(out: Path, workers: int = 1, **section: Any) -> Recipe:
    section = {"size": 60, "coarse": 5, "iterations": 3, "polish": 2} | section
    given = {
        "out": str(out),
        "tracking": {"uri": "off"},
        "codebook": section,
        "resources": {"actors": workers},
    }
    return Recipe.model_validate(given)


def write(folder: str, key: str, x_NC: np.ndarray) -> None:
    columns = [
        ["x"] * len(x_NC),
        list(range(len(x_NC))),
        shards.list_column(x_NC.astype(np.float16)),
    ]
    shards.write_shard(folder, key, pa.table(columns, shards.feature_schema(x_NC.shape[1])))


def plant(run: StageRun) -> dict[str, int]:
    """Vectors around 40 centres, the last shard of ten held out."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, DIM)) * 3
    for number in range(SHARDS):
        x_NC = centres[rng.integers(40, size=ROWS)] + 0.3 * rng.normal(size=(ROWS, DIM))
        write(
            run.path,
            shards.shard_key("train", number) if number < SHARDS - 1 else "val/00000",
            x_NC,
        )
    return {"vectors": SHARDS * ROWS}


def planted(out: Path, workers: int = 1, **section: Any) -> Recipe:
    wanted = recipe(out, workers, **section)
    run_stage(wanted, "features", "features", {}, {}, plant)
    return wanted


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five chunks."""
    monkeypatch.setattr(passes, "CHUNK_VECTORS", 1_000)


def files(folder: str | Path) -> dict[str, bytes]:
    found = (
        path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != RECORD
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def kill_when(process: Any, work: Path, pattern: str) -> dict[Path, int]:
    """SIGKILL the stage when a file matches: the files there are then, and their times."""
    deadline = time.monotonic() + 200
    while not list(work.glob(pattern)):
        assert process.poll() is None, f"it ended before {pattern}: {process.text()}"
        assert time.monotonic() < deadline, f"{pattern} did not come"
        time.sleep(0.001)
    process.kill()
    time.sleep(0.5)  # its tasks end with it
    return {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}


@pytest.mark.timeout(400)
def test_a_kill_in_every_phase_ends_with_the_same_bytes_and_nothing_is_made_twice(
    start: Any, as_driver: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_sums, "RANGE_NUMBERS", 7 * DIM)
    monkeypatch.setattr(partial_sums, "FOLD", 2)
    whole = codebook.run(planted(tmp_path / "whole", workers=2))
    torn = planted(tmp_path / "torn")
    stood: dict[Path, int] = {}
    for pattern in MOMENTS:
        process = start(["-c", CHILD, torn.model_dump_json()], as_driver)
        stands = kill_when(process, Path(torn.out) / "codebook" / "work", pattern)
        assert all(stands[path] == since for path, since in stood.items() if path in stands), (
            pattern
        )
        stood = stands
    assert not (Path(torn.out) / "codebook" / RECORD).exists()
    made = codebook.run(torn)
    assert files(made.path) == files(whole.path)
    assert (made.scores, made.counts) == (whole.scores, whole.counts)
    assert made.scores["distortion/val"] < 2 * 0.09 * DIM, "the planted noise"


def test_ranges_added_in_tasks_are_the_sums_of_a_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(partial_sums, "RANGE_NUMBERS", 7 * DIM)
    monkeypatch.setattr(partial_sums, "FOLD", 2)
    monkeypatch.setattr(partial_sums, "MOVED_NUMBERS", 3 * DIM)
    parts = passes.chunks(str(Path(planted(tmp_path).out) / "features"), "train")
    assert [chunk.rows for chunk in parts] == [1000, 1000, 1000, 1000, 500]
    x_NC = torch.cat([x_NC for chunk in parts for x_NC in chunk.vectors()])
    codes_KC = x_NC[:20].clone()
    sums = partial_sums.RangeSums(20, DIM)
    passes.full_pass(
        parts, Tree(x_NC[:1], codes_KC, torch.zeros(20, dtype=torch.int64)), 2, sums=sums
    )
    given = list(sums.ranges())
    assert [codes.stop - codes.start for codes, _ in given] == [3, 3, 1, 3, 3, 1, 3, 3], (
        "some codes at a time"
    )
    found = torch.cat([rows for _, rows in given])
    ids_N = torch.cdist(x_NC.double(), codes_KC.double()).argmin(1)
    expected = torch.stack([x_NC[ids_N == code].double().sum(0) for code in range(20)])
    assert len(sums.bounds) == 3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_pieces_of_the_cell_files_hold_every_vector_once_and_meet_fewer_codes(
    tmp_path: Path,
) -> None:
    parts = passes.chunks(str(Path(planted(tmp_path).out) / "features"), "train")
    x_NC = torch.cat([x_NC for chunk in parts for x_NC in chunk.vectors()])
    cells_PC, codes_KC = x_NC[:40], x_NC[1000:1200]
    starts_FP = cell_files.write_cells(parts, cells_PC, str(tmp_path / "cells"), 2)
    pieces = cell_ranges.cell_chunks(parts, starts_FP, str(tmp_path / "cells"))
    seen_NC = torch.cat([block for piece in pieces for block in piece.vectors()])
    assert sorted(map(tuple, seen_NC.tolist())) == sorted(map(tuple, x_NC.tolist()))
    assert max(piece.rows for piece in pieces) <= 1000
    tree = placed(Tree(cells_PC, codes_KC, torch.zeros(200, dtype=torch.int64)))
    arrays, bounds = (tree.cells.numpy(), tree.codes.numpy(), tree.cell_of.numpy()), [(0, 200)]
    met = [
        sum(next(passes._chunk_sums(part, arrays, passes.POLISH, bounds))[1][0] for part in side)
        for side in (pieces, parts)
    ]
    assert met[0] < 0.5 * met[1], "rows of sums that go to the tasks that add them"
    by_pieces, by_chunks = (
        passes.lloyd(side, tree.with_codes(tree.codes.clone()), 2)[0].codes
        for side in (pieces, parts)
    )
    torch.testing.assert_close(by_pieces, by_chunks)


@pytest.mark.parametrize(("coarse", "asked"), [(5, 0.9), (2, 1.0)])
def test_the_cells_searched_reach_the_recall_asked_for(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    coarse: int,
    asked: float,
) -> None:
    monkeypatch.setattr(recall, "VECTORS", ROWS)
    monkeypatch.setattr(recall, "MOST_VECTORS", ROWS)
    made = codebook.run(planted(tmp_path, coarse=coarse, recall=asked, polish=0))
    tree = load_file(Path(made.path) / TREE)
    index = CodeIndex(load_centroids(made.path), tree["cells"], tree["cell_of"])
    (held_out,) = passes.chunks(str(tmp_path / "features"), "val")
    x_NC = next(held_out.vectors())
    probes = index.probes_for(x_NC, asked)
    assert (int(tree["searched_cells"]), float(tree["reach"]), float(tree["recall"])) == probes
    assert (made.counts["searched_cells"], made.scores["recall"]) == (probes.cells, probes.recall)
    assert probes.recall >= asked
    index = smalti.load_codebook(made.path)
    assert index.probes == probes
    distance_N = index.nearest(x_NC)[1]
    assert made.scores["distortion/val"] == pytest.approx(
        float(distance_N.double().mean()), rel=1e-6
    )
    assert ("codebook.recall=1.0 needs all of them" in capfd.readouterr().err) == (
        probes.cells == coarse
    )


def test_large_cells_are_sampled_and_it_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = codebook.run(planted(tmp_path, cell_vectors=300, polish=0))
    assert made.counts["sampled_cells"] == 5
    assert made.counts["replaced"] == 0
    assert "5 cells hold more than codebook.cell_vectors=300 vectors" in capfd.readouterr().err
    assert made.scores["distortion/val"] < 2 * 0.09 * DIM


def test_a_sample_of_a_cell_is_among_its_vectors_and_the_same_for_any_files(tmp_path: Path) -> None:
    parts = passes.chunks(str(Path(planted(tmp_path).out) / "features"), "train")
    centres_PC = next(parts[0].vectors())[:3]
    for chunk in parts:
        cell_files._chunk_cells(chunk, centres_PC, str(tmp_path / "cells"))
    names = [cell_files.cell_file(str(tmp_path / "cells"), chunk) for chunk in parts]
    every, some = (
        cell_files.read_cells(
            names, 0, 3, cell_files.CellSettings(DIM, iterations=1, seed=3, bound=bound)
        )
        for bound in (9999, 40)
    )
    assert sum(len(x_NC) for x_NC in every) == 4500
    for whole_NC, drawn_NC in zip(every, some, strict=True):
        assert len(drawn_NC) == 40
        assert {tuple(row) for row in drawn_NC.tolist()} <= {
            tuple(row) for row in whole_NC.tolist()
        }
    alone = cell_files.read_cells(
        names, 1, 2, cell_files.CellSettings(DIM, iterations=1, seed=3, bound=40)
    )
    assert torch.equal(alone[0], some[1]), "read alone or with its neighbours"


@pytest.mark.parametrize("coarse", [1, 5])
def test_spherical_codes_are_unit_vectors_and_random_seeds_do(tmp_path: Path, coarse: int) -> None:
    made = codebook.run(
        planted(tmp_path, coarse=coarse, spherical=True, seeding="random", polish=1)
    )
    codes_KC = load_centroids(made.path)
    torch.testing.assert_close(codes_KC.norm(dim=-1), torch.ones(60))
    assert made.scores["distortion/val"] < 0.1, "2 − 2·cosine"


def test_codes_that_repeat_or_are_not_finite_are_dropped_and_k_says_so(tmp_path: Path) -> None:
    def few(run: StageRun) -> dict[str, int]:
        rng = np.random.default_rng(0)
        write(run.path, "train/00000", np.repeat(rng.normal(size=(8, 6)), 25, 0))
        return {"vectors": 200}

    wanted = recipe(tmp_path, size=12, coarse=2, duplicates="drop")
    run_stage(wanted, "features", "features", {}, {}, few)
    made = codebook.run(wanted)
    assert (made.counts["codes"], made.counts["dropped"], made.counts["replaced"]) == (8, 4, 0)
    assert load_centroids(made.path).shape == (8, 6)
    codes_KC = torch.tensor(
        [[1.0, 0.0], [1.0, -0.0], [float("nan"), 0], [2.0, 0.0], [float("inf"), 0]]
    )
    assert distinct.unusable(codes_KC).tolist() == [False, True, True, False, True]


def test_codes_that_must_move_go_to_the_farthest_distinct_vectors_and_this_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "FAR_A_CHUNK", 2)
    wanted = planted(tmp_path)
    parts = passes.chunks(str(tmp_path / "features"), "train")
    x_NC = torch.cat([x_NC for chunk in parts for x_NC in chunk.vectors()])
    codes_KC, bad_K = x_NC[:50].clone(), torch.arange(50) >= 20
    codes_KC[30:] = float("nan")
    nearest_N = torch.cdist(x_NC, codes_KC[:20]).amin(-1)
    tree = Tree(x_NC[:1], codes_KC, torch.zeros(50, dtype=torch.int64))
    assert torch.equal(distinct.unusable(codes_KC), torch.arange(50) >= 30)
    made = distinct.replaced(parts, tree, bad_K, 2)
    assert made.codes.data_ptr() == codes_KC.data_ptr(), "in place"
    torch.testing.assert_close(
        torch.cdist(made.codes[20:], made.codes[:20]).amin(-1), nearest_N.topk(30).values
    )
    assert not distinct.unusable(made.codes).any()
    with ensure_ray(wanted):
        build = CodebookBuild(
            StageRun("codebook", str(tmp_path / "codebook"), wanted, NullTracker(), False, ""),
            parts,
            2,
        )
        first = build.usable(
            Tree(x_NC[:1], x_NC[:1].repeat(9, 1), torch.zeros(9, dtype=torch.int64))
        )
        again = build.usable(
            Tree(x_NC[:1], x_NC[:1].repeat(9, 1), torch.zeros(9, dtype=torch.int64))
        )
    assert torch.equal(first[0].codes, again[0].codes) and first[1] == again[1] == {"replaced": 8}


def test_recall_is_measured_on_training_vectors_too_where_few_are_held_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = planted(tmp_path, polish=0)
    write(str(tmp_path / "features"), "val/00000", np.zeros((5, DIM)))
    write(str(tmp_path / "features"), "val/00001", np.zeros((0, DIM)))
    made = codebook.run(wanted)
    assert made.scores["vectors/recall"] == 4096
    assert "of 5 held-out and 4,091 training vectors find" in capfd.readouterr().err
    assert made.scores["vectors/val"] == 5


def test_a_cell_without_codes_is_not_among_all_that_are_needed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "MOST_VECTORS", ROWS)
    wanted = planted(tmp_path, coarse=3, recall=1.0)
    run = StageRun("codebook", str(tmp_path / "codebook"), wanted, NullTracker(), False, "")
    parts = passes.chunks(str(tmp_path / "features"), "train")
    x_NC = next(parts[0].vectors())
    cells_PC = torch.cat([x_NC[:2], torch.full((1, DIM), 99.0)])
    tree = placed(Tree(cells_PC, x_NC[100:120].clone(), torch.zeros(20, dtype=torch.int64)))
    assert recall.probes(run, recall.draw(run, parts, [], 2), tree, 2).cells == 2
    told = "of 500 training vectors find their nearest code in at most 2 of 2 cells: codebook.recall=1.0 needs all of them"
    assert told in capfd.readouterr().err


def test_zero_vectors_have_no_part_in_spherical_codes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = planted(tmp_path, spherical=True, polish=1, size=200)
    for key in ("train/00004", "train/00005"):  # a whole chunk
        write(str(tmp_path / "features"), key, np.zeros((ROWS, DIM)))
    made = codebook.run(wanted)
    torch.testing.assert_close(load_centroids(made.path).norm(dim=-1), torch.ones(200))
    assert made.counts["zero_vectors"] == 2 * ROWS and made.scores["vectors/train"] == 7 * ROWS
    assert f"{2 * ROWS} training vectors are 0" in capfd.readouterr().err


def test_codes_that_sampled_cells_cannot_give_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"codebook.size=2,000.*cell_vectors=500.* see 1,000 vectors at most"
    ):
        codebook.run(planted(tmp_path / "a", size=2000, coarse=2, cell_vectors=500))
    wanted = planted(tmp_path / "b", size=2000, coarse=2, cell_vectors=1000)
    few = np.random.default_rng(0).normal(size=(ROWS, DIM)) + 100
    for number in range(SHARDS - 1):
        write(
            str(tmp_path / "b" / "features"),
            shards.shard_key("train", number),
            few if number < 1 else few - 200,
        )
    with pytest.raises(ConfigError, match=r"cell_vectors=1,000 .* see 1,500 vectors at most"):
        codebook.run(wanted)


@pytest.mark.parametrize("bad", ["width", "nan", "val", "nan in val"])
def test_a_bad_shard_is_named(tmp_path: Path, bad: str) -> None:
    wanted = planted(tmp_path)
    folder = str(Path(wanted.out) / "features")
    x_NC = np.zeros((ROWS, DIM + (bad == "width") + (bad == "val")))
    x_NC[3, 2] = np.nan if bad.startswith("nan") else 0
    write(folder, "val/00000" if bad.endswith("val") else "train/00004", x_NC)
    message = {
        "width": r"train/00004.parquet holds vectors of 9 numbers, where the other shards .* hold 8",
        "nan": r"train/00004.parquet holds NaN or Inf",
        "nan in val": r"val/00000.parquet holds NaN or Inf",
        "val": r"train vectors have 8 numbers, val vectors 9",
    }[bad]
    with pytest.raises(DataError, match=message):
        codebook.run(wanted)
    assert Artifact.find(str(Path(wanted.out) / "codebook")) is None
    assert not list((Path(wanted.out) / "codebook").glob("work/coarse-*")), "told before k-means"
    if not bad.startswith("nan"):
        assert not (Path(wanted.out) / "codebook" / "work").exists(), "told before any work"
