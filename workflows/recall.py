"""How many cells of the tree a search must see to find the nearest code, by vectors drawn from the features.

Axis letters as in `clustering`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smalti.tokenizers.code_index import CodeIndex, fewest_cells
from smalti.workflows.clustering import Chunk, Tree, in_order, sample

VECTORS = 4_096  # drawn; each is compared with all K codes
TASK_VECTORS = 512


def cells_for(
    parts: Sequence[Chunk], tree: Tree, recall: float, seed: int, workers: int, folder: str
) -> tuple[int, float, int]:
    """Fewest cells with which the tree search reaches a recall@1 on a seeded sample of the vectors, the recall reached,
    and the number of vectors. A pass; the sample is kept in `folder`."""
    drawn = sample(parts, VECTORS, seed, workers, folder)
    num = sum(chunk.rows for chunk in drawn)
    shared, step = tree.shared(), -(-num // TASK_VECTORS)
    items = [(chunk, shared, first, step) for chunk in drawn for first in range(min(step, chunk.rows))]
    ranks_P = sum(in_order(_ranks, items, workers, parts[0].gpus), torch.zeros(1, dtype=torch.int64))
    return *fewest_cells(ranks_P, recall), num


def _ranks(chunk: Chunk, shared: tuple[np.ndarray, ...], first: int, step: int) -> Tensor:
    """Task of `cells_for`, every `step`-th vector of a chunk: see `CodeIndex.ranks`."""
    tree = Tree.of_shared(shared, chunk.device)
    x_NC = torch.cat([x_NC for _, x_NC in chunk.vectors()])[first::step]
    return CodeIndex(tree.codes, tree.cells, tree.cell_of).ranks(x_NC).cpu()
