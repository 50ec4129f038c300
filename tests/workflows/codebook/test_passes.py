"""The parts of the stage codebook that need no Ray: memory of the driver, pieces of cells, sums of
a chunk.

Covers: workflows/codebook/cell_files.py, workflows/codebook/cell_ranges.py,
workflows/codebook/tasks.py, workflows/codebook/tree.py,
workflows/codebook/duplicates.py, workflows/codebook/partial_sums.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from smalti import shards, storage
from smalti.errors import DataError
from smalti.schema import Recipe
from smalti.tokenizers import kmeans, tensor_files
from smalti.workflows.codebook import cell_files, cell_ranges, partial_sums, passes
from smalti.workflows.codebook import duplicates as distinct
from smalti.workflows.codebook import stage as codebook
from smalti.workflows.codebook import tree as tree_module
from smalti.workflows.codebook.tree import Tree, placed

DIM = 8


def peak_bytes(work: Callable[[], object]) -> int:
    """Memory that the work takes at its peak, with what it returns, beyond what this process had."""

    def memory(name: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    kept = work()
    found = memory("VmHWM") - before
    del kept
    return found


def write(folder: Path, key: str, x_NC: np.ndarray) -> None:
    columns = [["x"] * len(x_NC), list(range(len(x_NC))), shards.list_column(x_NC)]
    shards.write_shard(str(folder), key, pa.table(columns, shards.feature_schema(x_NC.shape[1])))


def test_the_sums_of_a_chunk_are_those_of_a_loop_in_a_row_a_code_that_occurs() -> None:
    draw = torch.Generator().manual_seed(0)
    x_NC, ids_N = torch.randn(50, DIM, generator=draw), torch.randint(1000, (50,), generator=draw)
    sums = partial_sums.UsedSums(1000, DIM, 50)
    for rows in (slice(0, 30), slice(30, 50)):
        sums.add(x_NC[rows], ids_N[rows])
    used, found = sums.part(100, 900)
    expected = sorted(code for code in set(ids_N.tolist()) if 100 <= code < 900)
    assert (used + 100).tolist() == expected
    for code, row in zip(expected, found, strict=True):
        np.testing.assert_allclose(row, x_NC[ids_N == code].double().sum(0).numpy(), rtol=1e-12)
    assert len(sums.sums) == 50, "rows follow the vectors, not the codes"


def test_codes_put_in_the_order_of_their_cells_keep_their_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tree_module, "COLUMNS", 3)
    monkeypatch.setattr(tree_module, "MOVED_NUMBERS", 0)
    codes_KC, cell_of_K = torch.randn(20, DIM), torch.randint(4, (20,))
    tree = Tree(torch.randn(4, DIM), codes_KC.clone(), cell_of_K).in_cell_order()
    order = torch.argsort(cell_of_K, stable=True)
    assert torch.equal(tree.codes, codes_KC[order])
    assert torch.equal(tree.cell_of, cell_of_K[order])


def test_a_cell_larger_than_a_chunk_is_cut_between_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "CHUNK_VECTORS", 1_000)
    parts = [passes.Chunk("", ((f"train/{number:05d}", 600),), DIM) for number in range(3)]
    starts_FP = np.array([[0, 50, 600, 600], [0, 0, 550, 600], [0, 100, 600, 600]], np.int32)
    spans = [piece.spans for piece in cell_ranges.cell_chunks(parts, starts_FP, "f")]
    a, b, c = (f"f/train-{number:05d}" for number in range(3))
    assert spans == [
        ((a, 0, 50), (c, 0, 100)),
        ((a, 50, 600),),
        ((b, 0, 550),),
        ((c, 100, 600),),
        ((b, 550, 600),),
    ]


def test_no_second_matrix_of_codes_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory of what the driver does with its codes, in multiples of these."""
    monkeypatch.setattr(tree_module, "MOVED_NUMBERS", 1 << 18)
    codes_KC = torch.randn(100_000, 160)  # 64 MB
    tree, path = (
        Tree(codes_KC[:8].clone(), codes_KC, torch.zeros(100_000, dtype=torch.int64)),
        str(tmp_path / "a"),
    )
    bad_K = torch.arange(100_000) % 1000 == 3

    def peak(work: Callable[[], object]) -> float:
        return peak_bytes(work) / codes_KC.nbytes

    assert peak(lambda: tensor_files.write(path, {"codes": codes_KC})) < 0.3
    assert peak(lambda: tensor_files.read(path)) < 1.3
    assert peak(lambda: distinct.unusable(codes_KC)) < 0.6, "names of the codes"
    assert peak(lambda: placed(tree)) < 0.6, "scores of a block"
    assert peak(lambda: distinct.without(tree, bad_K)) < 0.3
    assert peak(lambda: kmeans.assign(codes_KC, codes_KC[:8])) < 0.3


def test_the_vectors_of_a_cell_are_read_into_their_place(tmp_path: Path) -> None:
    rows_NC = np.ones((40_000, 128), np.float16)
    names = [str(tmp_path / f"{number}") for number in range(4)]
    for name in names:
        storage.write_atomic(f"{name}.bin", rows_NC.data)
        np.save(f"{name}.npy", np.array([0, len(rows_NC)]))
    settings = cell_files.CellSettings(128, iterations=1, seed=0, bound=999_999)
    assert (
        peak_bytes(lambda: cell_files.read_cells(names, 0, 1, settings))
        < 1.4 * 4 * rows_NC.size * 4
    )


def test_one_iteration_is_one_with_faiss_too() -> None:
    x_NC = torch.randn(200, DIM, generator=torch.Generator().manual_seed(0))
    settings = cell_files.CellSettings(DIM, iterations=1, seed=3, bound=999)
    made = cell_files.cell_codes(x_NC, 9, 4, settings)
    draw = torch.Generator().manual_seed(int(cell_files._rng(3, 4).integers(2**63)))
    assert torch.equal(made, kmeans.kmeans(x_NC, 9, 1, draw))


@pytest.mark.parametrize("place", ["here", "memory://parts"])
def test_tensors_are_kept_as_safetensors_keeps_them_and_a_torn_file_is_told(
    place: str, tmp_path: Path
) -> None:
    path = f"{place if '://' in place else tmp_path}/a.safetensors"
    tensors = {
        "codes": torch.randn(3, 4),
        "none": torch.empty(0, 4),
        "id": torch.arange(5),
        "n": torch.tensor(0.5).double(),
    }
    tensor_files.write(path, tensors)
    data = storage.read_bytes(path)
    assert data == save(tensors)
    found = tensor_files.read(path)
    assert {key: value.tolist() for key, value in found.items()} == {
        key: t.tolist() for key, t in tensors.items()
    }
    storage.write_atomic(path, data[:-3])
    with pytest.raises(DataError, match="it ends within"):
        tensor_files.read(path)
    assert storage.read_range(path, 8, 5) == data[8:13]


def test_shards_without_a_vector_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "train/00000", np.ones((3, DIM), np.float16))
    write(tmp_path, "train/00001", np.ones((0, DIM + 1), np.float16))
    write(tmp_path, "val/00000", np.ones((0, DIM), np.float16))
    assert [chunk.parts for chunk in passes.chunks(str(tmp_path), "train")] == [
        (("train/00000", 3),)
    ]
    assert passes.chunks(str(tmp_path), "val") == []


def test_a_layout_of_gpus_is_tried_on_cpus(tmp_path: Path) -> None:
    write(tmp_path, "train/00000", np.ones((9, DIM), np.float16))
    asked = Recipe.model_validate({"resources": {"gpus_per_worker": 1, "device": "cpu"}})
    ((chunk,), held_out) = codebook._chunks(asked, str(tmp_path))
    assert (chunk.gpus, chunk.device, held_out) == (1, "cpu", [])
