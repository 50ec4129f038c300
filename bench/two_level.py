"""Two-level k-means in one process, of the functions that the stage `codebook` is made of.

Axis letters: N vectors, C their width, K codes, P cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smalti.tokenizers import kmeans
from smalti.tokenizers.code_index import CodeIndex
from smalti.workflows.codebook import cell_files

SPLITS = {"proportional": kmeans.allocate, "equal": kmeans.share_equally}


@dataclass(frozen=True)
class TwoLevel:
    """`size` codes in `coarse` cells, as in a recipe's section `codebook`."""

    size: int
    coarse: int
    iterations: int = 3
    polish: int = 0
    probes: int = 4
    split: Literal["proportional", "equal"] = "proportional"
    sample: int = 8_192

    def train(self, x_NC: Tensor) -> CodeIndex:
        """The codes of these vectors in their cells."""
        draw = torch.Generator().manual_seed(1)
        cells_PC = kmeans.kmeans(x_NC[: self.sample], self.coarse, self.iterations, draw)
        home_N = kmeans.assign(x_NC, cells_PC)[0]
        sizes = torch.bincount(home_N, minlength=self.coarse).tolist()
        shares = SPLITS[self.split](self.size, sizes)
        settings = cell_files.CellSettings(x_NC.shape[1], self.iterations, seed=1, bound=len(x_NC))
        members = torch.argsort(home_N, stable=True).split(sizes)
        codes = [
            cell_files.cell_codes(x_NC[rows], share, cell, settings)
            for cell, (rows, share) in enumerate(zip(members, shares, strict=True))
            if share
        ]
        cell_of_K = torch.repeat_interleave(torch.arange(self.coarse), torch.tensor(shares))
        index = CodeIndex(torch.cat(codes), cells_PC, cell_of_K)
        for _ in range(self.polish):
            ids_N, distance_N = index.tree(x_NC, self.probes)
            sums_KC, counts_K = kmeans.lloyd_stats(x_NC, ids_N, self.size)
            codes_KC = kmeans.move(index.codes, sums_KC, counts_K)
            codes_KC, _ = kmeans.reseed_empty(codes_KC, counts_K, x_NC, distance_N)
            index = CodeIndex(codes_KC, cells_PC, kmeans.assign(codes_KC, cells_PC)[0])
        return index


def distortion(x_NC: Tensor, codes_KC: Tensor | np.ndarray) -> float:
    """Mean squared distance of a vector to its nearest code."""
    return float(kmeans.assign(x_NC, torch.as_tensor(codes_KC))[1].double().mean())
