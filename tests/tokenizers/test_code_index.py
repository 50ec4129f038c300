"""CodeIndex against full distances: exact, through the tree, in bfloat16, with a bounded scratch.

Covers: tokenizers/nearest_kernel.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smalti.tokenizers import code_index, flat_search
from smalti.tokenizers.code_index import CodeIndex, Probes


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tree_index(num: int = 600, cells: int = 12, dim: int = 8) -> CodeIndex:
    """Random codes, each in the cell that is nearest to it; the last cell holds none."""
    codes, centres = drawn(num, dim, seed=1), drawn(cells, dim, seed=2)
    centres = torch.cat([centres, torch.full((1, dim), 100.0)])
    return CodeIndex(codes, centres, torch.cdist(codes, centres).argmin(-1))


def test_exact_search_finds_what_the_full_matrix_of_distances_says() -> None:
    index, x = tree_index(), drawn(300, 8)
    full = torch.cdist(x.double(), index.codes.double())
    ids, distance = index.exact(x)
    assert ids.dtype == torch.int64 and torch.equal(ids, full.argmin(-1))
    torch.testing.assert_close(distance.double(), full.amin(-1).square(), rtol=1e-4, atol=1e-5)


def test_the_tree_with_every_cell_is_exact() -> None:
    index, x = tree_index(), drawn(300, 8)
    for found, wanted in zip(index.tree(x, 99), index.exact(x), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_tree_searches_the_nearest_cells_only() -> None:
    index, x = tree_index(), drawn(200, 8)
    probed = torch.cdist(x, index.cells).topk(3, largest=False).indices
    allowed = (probed[:, :, None] == index.cell_of).any(1)
    distance = torch.cdist(x, index.codes).masked_fill(~allowed, float("inf"))
    assert torch.equal(index.tree(x, 3)[0], distance.argmin(-1))


def test_ties_take_the_lowest_code_also_across_cells() -> None:
    codes = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    index = CodeIndex(codes, torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 1, 0, 0]))
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    for found in (index.exact(x), index.exact(x, torch.bfloat16), index.tree(x, 2)):
        assert found[0].tolist() == [1, 1, 2]


def test_no_matrix_of_scores_is_larger_than_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    index, x = tree_index(), drawn(300, 8)
    wanted, sizes = index.exact(x)[0], []
    inner = flat_search.best_score

    def watched(z: Tensor, codes: Tensor, half_norms: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(z) * min(len(codes), flat_search.CODE_BLOCK))
        return inner(z, codes, half_norms)

    monkeypatch.setattr(flat_search, "best_score", watched)
    monkeypatch.setattr(flat_search, "SCRATCH_SCORES", 2048)
    monkeypatch.setattr(flat_search, "CODE_BLOCK", 64)
    monkeypatch.setattr(code_index, "CANDIDATE_BLOCK", 64)
    assert torch.equal(index.exact(x)[0], wanted) and len(sizes) == -(-300 // 32)
    assert torch.equal(index.exact(x, torch.bfloat16)[0], wanted)
    assert torch.equal(index.tree(x, 12)[0], wanted)
    assert max(sizes) <= 2048


def test_many_codes_leave_room_for_many_vectors_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, inner = [], flat_search.best_score

    def watched(z: Tensor, codes: Tensor, half_norms: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(z))
        return inner(z, codes, half_norms)

    monkeypatch.setattr(flat_search, "best_score", watched)
    CodeIndex(drawn(70_000, 2)).exact(drawn(1024, 2, seed=1))
    assert rows == [1024]


def test_recall_is_that_of_the_search_grows_with_the_cells_and_ends_at_one() -> None:
    index, x = tree_index(), drawn(300, 8)
    recalls, wanted = index.recalls(x), index.exact(x)[0]
    assert (
        len(recalls) == len(index.cells)
        and bool((recalls.diff() >= 0).all())
        and float(recalls[-1]) == 1
    )
    for num in (1, 2, 5):
        assert float(recalls[num - 1]) == float((index.tree(x, num)[0] == wanted).double().mean())


@pytest.mark.parametrize("asked", [0.2, 0.8, 0.97, 1.0])
def test_the_search_chosen_reaches_the_recall_and_no_smaller_one_does(asked: float) -> None:
    index, x = tree_index(), drawn(300, 8)
    wanted = index.exact(x)[0]

    def recall(cells: int, reach: float) -> float:
        return float((index.tree(x, cells, reach)[0] == wanted).double().mean())

    cells, reach, reached = index.probes_for(x, asked)
    assert recall(cells, reach) == reached >= asked
    assert recall(99, reach) == reached, "the reach alone does it"
    assert cells == 1 or recall(cells - 1, reach) < reached
    assert reach == 0 or recall(cells, reach * (1 - 1e-5)) < reached


@pytest.mark.parametrize(("num", "asked"), [(4_096, 0.99), (16_000, 0.999), (300, 0.8)])
def test_the_recall_asked_for_holds_on_other_vectors_too(num: int, asked: float) -> None:
    """Of reaches drawn from [0, 1] a search of reach r finds the share r: that is the recall on all
    other vectors.
    """
    draw = torch.Generator().manual_seed(0)
    ones = torch.ones(num, dtype=torch.int64)
    held = [
        Probes.reaching(ones, torch.rand(num, generator=draw), asked).reach >= asked
        for _ in range(200)
    ]
    assert 0.9 < sum(held) / len(held) < 1, "95 % of the draws, no more margin than that takes"


def test_cells_behind_a_far_plane_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    index, x, pairs = tree_index(cells=60), drawn(300, 8) * 2, []
    inner = CodeIndex._score

    def watched(self: CodeIndex, x: Tensor, rows: Tensor, *rest: Tensor) -> None:
        pairs.append(len(rows))
        inner(self, x, rows, *rest)

    monkeypatch.setattr(CodeIndex, "_score", watched)
    assert torch.equal(index.tree(x, 99)[0], index.exact(x)[0])
    assert pairs[0] == 300 and pairs[1] < 300 * (len(index.cells) - 1)


def test_distances_between_many_cells_are_not_kept_and_the_search_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, kept = drawn(300, 8), tree_index(cells=60)
    monkeypatch.setattr(code_index, "APART", 100)
    index = tree_index(cells=60)
    assert index._apart is None and kept._apart is not None
    for found, wanted in zip(index.tree(x, 9, 0.5), kept.tree(x, 9, 0.5), strict=True):
        torch.testing.assert_close(found, wanted)


def test_bfloat16_scores_with_rescoring_equal_float32() -> None:
    index, x = CodeIndex(drawn(3000, 32, seed=1)), drawn(400, 32)
    ids, distance = index.exact(x, torch.bfloat16)
    wanted, wanted_distance = index.exact(x)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(distance, wanted_distance)
    rough = (
        index.codes.bfloat16().float().square().sum(-1) / 2
        - x.bfloat16() @ index.codes.bfloat16().T
    ).argmin(-1)
    assert not torch.equal(rough, wanted)  # without rescoring it would not be


def test_no_vectors_give_no_codes_and_what_does_not_fit_is_refused() -> None:
    index = tree_index()
    assert (
        index.tree(drawn(0, 8), 2)[0].shape
        == index.exact(drawn(0, 8), torch.bfloat16)[0].shape
        == (0,)
    )
    with pytest.raises(ValueError, match="do not fit codes"):
        CodeIndex(drawn(4, 8), drawn(2, 7), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="names cell 5 of 2"):
        CodeIndex(drawn(4, 8), drawn(2, 8), torch.full((4,), 5))
    with pytest.raises(ValueError, match="num_cells is 0"):
        index.tree(drawn(1, 8), 0)
    with pytest.raises(ValueError, match=r"recall is 1\.5"):
        index.probes_for(drawn(9, 8), 1.5)


def test_codes_in_another_precision_are_made_once() -> None:
    index, x = tree_index(), drawn(300, 8)
    index.exact(x, torch.bfloat16)
    low = index._low[torch.bfloat16]
    index.exact(x, torch.bfloat16)
    assert index._low[torch.bfloat16] is low


KERNEL = """
import sys
import torch
from smalti.tokenizers import code_index, flat_search
sys.path.insert(0, "tests/tokenizers")
from test_code_index import drawn
code_index._has_kernel = lambda device, dtype: True
code_index.KERNEL_ROWS = 100
for num, width in ((700, 64), (700, 40), (3, 8)):
    codes, x = drawn(num, width, seed=1), drawn(150, width)
    codes[-1] = codes[0]
    x[7] = codes[0]
    index = code_index.CodeIndex(codes)
    ids, distance = index.exact(x, torch.float16)
    wanted, right = index.exact(x)
    assert torch.equal(ids, wanted) and ids[7] == 0
    torch.testing.assert_close(distance, right, rtol=1e-5, atol=1e-4)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_finds_the_same_under_tritons_interpreter(root: Path) -> None:
    """On the CPU, in a process of its own: tiles that are full, cut and nearly empty, widths that
    steps divide and not.

    In float16, as the interpreter has no product of bfloat16.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
