"""A codebook while it is computed: its cells, its codes, and the cell of each code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from smalti.tokenizers import kmeans
from smalti.workflows.codebook.partial_sums import mapped

if TYPE_CHECKING:
    from ray import ObjectRef

MOVED_NUMBERS = 1 << 23  # of the codes, moved at once
COLUMNS = 16  # moved at once, if more numbers than those
SharedTree = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Tree:
    """Cells float32 (P, C), codes float32 (K, C), and the cell of each code int64 (K,).

    With one cell, a flat codebook.
    """

    cells: Tensor
    codes: Tensor
    cell_of: Tensor

    def with_codes(self, codes_KC: Tensor) -> Tree:
        return replace(self, codes=codes_KC)

    def in_cell_order(self) -> Tree:
        """The tree with its codes in the order of their cells, as the search needs them.

        They are moved in place.
        """
        order = torch.argsort(self.cell_of, stable=True)
        step = max(COLUMNS, MOVED_NUMBERS // max(1, len(order)))
        for columns in range(0, self.codes.shape[1], step):
            part = slice(columns, columns + step)
            self.codes[:, part] = self.codes[order, part]
        return replace(self, cell_of=self.cell_of[order])

    def shared(self) -> ObjectRef:
        """A Ray reference for tasks; one copy per node. See `of_shared`."""
        import ray

        return ray.put((self.cells.numpy(), self.codes.numpy(), self.cell_of.numpy()))

    @classmethod
    def of_shared(cls, arrays: SharedTree, device: str) -> Tree:
        """The tree in a task; do not write to it."""
        return cls(*(mapped(array).to(device) for array in arrays))


def placed(tree: Tree) -> Tree:
    """The tree with every code in its nearest cell, in the order of the cells."""
    if len(tree.cells) == 1:
        return tree
    return replace(tree, cell_of=kmeans.assign(tree.codes, tree.cells)[0]).in_cell_order()
