"""Replace or drop codes that are NaN or Inf, or repeat another.

Axis letters as in `passes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smalti.errors import DataError
from smalti.tokenizers import kmeans
from smalti.tokenizers.code_index import CodeIndex
from smalti.workflows.codebook.passes import POLISH, Chunk
from smalti.workflows.codebook.tasks import in_order
from smalti.workflows.codebook.tree import Tree, placed

ROWS = 4_096  # of the codes, moved at once
NAME = "V16"  # of a vector: see `kmeans.row_names`


def unusable(codes_KC: Tensor) -> Tensor:
    """Mask of codes that hold NaN or Inf, or repeat an earlier one: bool (K,)."""
    low_K, high_K = torch.aminmax(codes_KC, dim=-1)
    bad_K = ~(torch.isfinite(low_K) & torch.isfinite(high_K))
    first = kmeans.first_distinct(codes_KC, torch.arange(len(codes_KC)), len(codes_KC), set())
    repeats_K = torch.ones_like(bad_K)
    repeats_K[first] = False
    return bad_K | repeats_K


def without(tree: Tree, bad_K: Tensor) -> Tree:
    """The tree without these codes; the others are moved in place."""
    kept = (~bad_K).nonzero().flatten()
    for start in range(0, len(kept), ROWS):
        ids = kept[start : start + ROWS]
        tree.codes[start : start + len(ids)] = tree.codes[ids]
    return Tree(tree.cells, tree.codes[: len(kept)], tree.cell_of[kept])


def replaced(parts: Sequence[Chunk], tree: Tree, bad_K: Tensor, workers: int) -> Tree:
    """Replace every bad code, in place, by a vector that is not a code yet.

    The vectors farthest from their codes come first. One pass, and a read of the chunks that hold
    them.

    Raises:
        DataError: if there are fewer distinct vectors than codes.
    """
    bad, good = bad_K.nonzero().flatten(), (~bad_K).nonzero().flatten()
    # meanwhile they repeat a good one: the search never returns them
    for start in range(0, len(bad), ROWS):
        tree.codes[bad[start : start + ROWS]] = tree.codes[good[0]].clone() if len(good) else 0.0
    far = _Far(len(bad))
    for number, found in enumerate(
        in_order(_chunk_far, _items(parts, tree, len(bad)), workers, parts[0].gpus)
    ):
        far.add(number, *found)
    if len(far.rows) < len(bad):
        num = len(good) + len(far.rows)
        raise DataError(
            f"codebook.size={len(bad_K)}, but the features hold only {num} distinct vectors. "
            f"Set codebook.size to at most {num}, or use more images or patches."
        )
    holders = np.unique(far.chunks).tolist()
    reads = [(parts[number].on_cpu(), far.rows[far.chunks == number]) for number in holders]
    for number, rows_NC in zip(holders, in_order(_chunk_rows, reads, workers), strict=True):
        tree.codes[bad[torch.from_numpy(far.chunks == number)]] = rows_NC
    return placed(tree)


class _Far:
    """The `num` distinct vectors of all chunks that are farthest from their codes."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.chunks = np.empty(0, np.int64)
        self.rows = np.empty(0, np.int64)
        self.distances = np.empty(0, np.float32)
        self.names = np.empty(0, NAME)

    def add(self, number: int, distances: np.ndarray, names: np.ndarray, rows: np.ndarray) -> None:
        """Add the vectors of a chunk; at equal distance the earlier ones come first."""
        distances = np.concatenate([self.distances, distances])
        names = np.concatenate([self.names, names])
        known = set[bytes]()
        kept = list[int]()
        for place in np.argsort(-distances, kind="stable").tolist():
            name = names[place].tobytes()
            if len(kept) < self.num and name not in known:
                known.add(name)
                kept.append(place)
        self.chunks = np.concatenate([self.chunks, np.full(len(rows), number)])[kept]
        self.rows = np.concatenate([self.rows, rows])[kept]
        self.distances = distances[kept]
        self.names = names[kept]


def _items(parts: Sequence[Chunk], tree: Tree, num: int) -> list[tuple[object, ...]]:
    import ray

    shared = tree.shared()
    known = ray.put(np.frombuffer(b"".join(kmeans.row_names(tree.codes)), NAME))
    return [(chunk, shared, known, num) for chunk in parts]


def _chunk_far(
    chunk: Chunk, shared: tuple[np.ndarray, ...], known: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Task of `replaced`: distance, name and row of a chunk's farthest vectors.

    They are distinct and not codes themselves.
    """
    tree = Tree.of_shared(shared, chunk.device)
    names = set(known.tolist())
    far = _Far(num)
    start = 0
    with torch.device(chunk.device):
        index = CodeIndex(tree.codes, tree.cells, tree.cell_of)
        for x_NC in chunk.vectors():
            distance_N = index.tree(x_NC, POLISH.cells, POLISH.reach)[1]
            order = torch.argsort(distance_N, descending=True, stable=True)
            rows = kmeans.first_distinct(x_NC, order.cpu(), num, names).to(x_NC.device)
            own = np.frombuffer(b"".join(kmeans.row_names(x_NC[rows])), NAME)
            far.add(0, distance_N[rows].cpu().numpy(), own, rows.cpu().numpy() + start)
            start += len(x_NC)
    return far.distances, far.names, far.rows


def _chunk_rows(chunk: Chunk, rows: np.ndarray) -> Tensor:
    """Task of `replaced`: some vectors of a chunk, float32 (n, C)."""
    found_NC = torch.empty(len(rows), chunk.width)
    start = 0
    for x_NC in chunk.vectors():
        mine = (rows >= start) & (rows < start + len(x_NC))
        found_NC[torch.from_numpy(mine)] = x_NC[torch.from_numpy(rows[mine] - start)]
        start += len(x_NC)
    return found_NC
