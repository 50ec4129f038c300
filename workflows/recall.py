"""How much of the tree a search must see to find the nearest code, by vectors drawn from the features.

Axis letters as in `clustering`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smalti.tokenizers.code_index import CodeIndex, Probes
from smalti.workflows.clustering import Chunk, Tree, in_order, sample

VECTORS, MOST_VECTORS = 4_096, 32_768  # drawn; each is compared with all K codes
MISSED = 16  # of them by a search of just the recall asked for, where these bounds let so many be drawn
TASK_VECTORS = 512


def probes_for(parts: Sequence[Chunk], tree: Tree, recall: float, seed: int, workers: int, folder: str) -> Probes:
    """The least search of the tree that reaches a recall@1 on a seeded sample of the vectors. A pass; the sample is kept
    in `folder`."""
    drawn = sample(parts, num_vectors(recall), seed, workers, folder)
    shared, step = tree.shared(), -(-sum(chunk.rows for chunk in drawn) // TASK_VECTORS)
    items = [(chunk, shared, first, step) for chunk in drawn for first in range(min(step, chunk.rows))]
    cells, reaches = zip(*in_order(_needs, items, workers, parts[0].gpus), strict=True)
    return Probes.reaching(torch.cat(cells), torch.cat(reaches), recall)


def num_vectors(recall: float) -> int:
    """How many vectors a recall is measured on: the nearer it is to 1, the more tell it from a lower one."""
    return round(min(MOST_VECTORS, max(VECTORS, MISSED / max(1 - recall, 1e-9))))


def _needs(chunk: Chunk, shared: tuple[np.ndarray, ...], first: int, step: int) -> tuple[Tensor, Tensor]:
    """Task of `probes_for`, every `step`-th vector of a chunk: see `CodeIndex.needs`."""
    tree = Tree.of_shared(shared, chunk.device)
    x_NC = torch.cat([x_NC for _, x_NC in chunk.vectors()])[first::step]
    cells_N, reach_N = CodeIndex(tree.codes, tree.cells, tree.cell_of).needs(x_NC)
    return cells_N.cpu(), reach_N.cpu()
