"""Nearest codes of many vectors: exactly, or through the tree that k-means left.

Axis letters: N vectors, C their width, K codes, P cells, B candidates of a vector.
"""

from __future__ import annotations

import bisect
import math
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.tokenizers import quantizers

PAIRS = 1 << 24
"""Cells of vectors that a tree search looks at together."""
APART = 1 << 26
"""Distances between cells that an index keeps; those of more cells are taken again for the vectors at hand."""
ROUNDING = 1e-6
"""Of a vector's squared norm: the error of a squared distance."""
TINY = torch.finfo(torch.float32).tiny
SIGMAS = 1.645
"""Of a normal distribution, below which 95 % of it lie."""
CANDIDATE_BLOCK = 1 << 16
"""Codes among which candidates are looked for at once: each look is a sort, and few of them suit a GPU."""
CANDIDATES = 16
"""Codes of each vector that are scored again in float32 after a search in another precision."""
KERNEL_ROWS = 4096
"""Vectors that a GPU searches together with the kernel: 0.3 GB of candidates at width 1152."""


class Probes(NamedTuple):
    """How much of the tree a search sees, `tree(x, cells, reach)`, and the recall@1 that was measured with it."""

    cells: int
    reach: float
    recall: float

    @classmethod
    def reaching(cls, cells_N: Tensor, reach_N: Tensor, recall: float) -> Probes:
        """The least reach, and with it the fewest cells, that reach a recall on vectors like those of these
        `CodeIndex.needs`: so many of these are found that at 95 % it holds for others too (`lower_bound`). Where they are
        too few to say so, all of them are found.

        ValueError: a recall outside (0, 1], or no vectors.
        """
        if not 0 < recall <= 1:
            raise ValueError(f"a recall of {recall} is asked for; want one in (0, 1]")
        if not len(cells_N):
            raise ValueError("recall on 0 vectors")
        num = len(cells_N)
        wanted = min(num, bisect.bisect_left(range(num + 1), recall, key=lambda found: lower_bound(found, num)))
        reach = float(reach_N.sort().values[max(wanted, 1) - 1])
        found_N = reach_N <= reach
        return cls(int(cells_N[found_N].max()), reach * (1 + 1e-6), float(found_N.double().mean()))


def lower_bound(found: int, num: int) -> float:
    """What a share is at least, at 95 %, that was seen `found` times of `num`: Wilson's one-sided bound."""
    share, square = found / num, SIGMAS**2 / num
    spread = SIGMAS * math.sqrt((share * (1 - share) + square / 4) / num)
    return (share + square / 2 - spread) / (1 + square)


class CodeIndex:
    """Codes (K, C) and, for the tree search, cells (P, C), the cell of each code, int64 (K,), and how much of it to see.

    The codes lie sorted by cell and their half-norms beside them, so that a cell is one GEMM against contiguous rows.
    Results lie on the codes' device, where the vectors must lie too. ValueError: shapes that do not go together.
    """

    def __init__(
        self,
        codes_KC: Tensor,
        cells_PC: Tensor | None = None,
        cell_of_K: Tensor | None = None,
        probes: Probes | None = None,
    ) -> None:
        if codes_KC.ndim != 2 or not len(codes_KC):
            raise ValueError(f"CodeIndex wants codes (K, C) with K >= 1, got {tuple(codes_KC.shape)}")
        self.codes, self.probes = codes_KC.float(), probes
        if cells_PC is None or cell_of_K is None:
            cells_PC, cell_of_K = self.codes.mean(0, keepdim=True), codes_KC.new_zeros(len(codes_KC), dtype=torch.int64)
        if cell_of_K.shape != (len(codes_KC),) or cells_PC.shape[1:] != codes_KC.shape[1:]:
            raise ValueError(
                f"CodeIndex: cells {tuple(cells_PC.shape)} and cell_of {tuple(cell_of_K.shape)} "
                f"do not fit codes {tuple(codes_KC.shape)}; want (P, C) and (K,)"
            )
        sizes_P = torch.bincount(cell_of_K, minlength=len(cells_PC))
        if len(sizes_P) > len(cells_PC):
            raise ValueError(f"CodeIndex: cell_of names cell {len(sizes_P) - 1} of {len(cells_PC)}")
        full = sizes_P > 0
        self.cells = cells_PC[full].float()  # a cell without codes is never searched
        self.cell_of = (full.cumsum(0) - 1)[cell_of_K]
        self._order = torch.argsort(cell_of_K, stable=True)
        in_place = bool((cell_of_K.diff() >= 0).all())  # codes that lie in the order of their cells are not copied
        self._sorted = self.codes if in_place else self.codes[self._order]
        self._half_norms = quantizers.squared_norms(self.codes) / 2
        self._sorted_half_norms = self._half_norms[self._order]
        self._cell_half_norms = quantizers.squared_norms(self.cells) / 2
        self._apart = torch.cdist(self.cells, self.cells) if len(self.cells) ** 2 <= APART else None
        self._starts = [0, *sizes_P[full].cumsum(0).tolist()]
        self._low: dict[torch.dtype, Tensor] = {}

    def exact(self, x_NC: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Code of each vector and its squared distance: int64 (N,), float32 (N,). Ties take the lowest code.

        With another dtype (bfloat16) the scores are taken in it, and the best `CANDIDATES` of them again in float32:
        exact unless that many codes lie within its rounding. On an A100 or H100 with triton bfloat16 scores are made by
        `nearest_kernel` and never stored: there three codes of one tile may hide one, too. The codes in that dtype stay
        with the index.
        """
        x_NC, block = x_NC.float(), min(len(self.codes), quantizers.CODE_BLOCK)
        ids_N, scores_N = _empty(x_NC)
        if dtype == torch.float32:
            for rows in _blocks(len(x_NC), block):
                scores_N[rows], ids_N[rows] = quantizers.best_score(x_NC[rows], self.codes, self._half_norms)
            return ids_N, _distance(quantizers.squared_norms(x_NC), scores_N)
        if dtype not in self._low:
            self._low[dtype] = self.codes.to(dtype).contiguous()
        low_KC, low_NC, kernel = self._low[dtype], x_NC.to(dtype).contiguous(), _has_kernel(x_NC.device, dtype)
        width = max(x_NC.shape[1] * CANDIDATES, min(len(self.codes), CANDIDATE_BLOCK))
        for rows in _blocks(len(x_NC), 1, KERNEL_ROWS) if kernel else _blocks(len(x_NC), width):
            found_NB = (_by_kernel if kernel else _candidates)(low_NC[rows], low_KC, self._half_norms)
            dots_NB = torch.einsum("nc,nbc->nb", x_NC[rows], self.codes[found_NB])
            scores_N[rows], place_N = (self._half_norms[found_NB] - dots_NB).min(-1)
            ids_N[rows] = found_NB.gather(1, place_N[:, None])[:, 0]
        return ids_N, _distance(quantizers.squared_norms(x_NC), scores_N)

    def nearest(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """As `exact`, by a search of the tree that sees as much as `probes` say; exact without them."""
        return self.exact(x_NC) if self.probes is None else self.tree(x_NC, self.probes.cells, self.probes.reach)

    def tree(self, x_NC: Tensor, num_cells: int, reach: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `exact`, among the codes of the `num_cells` cells nearest to each vector (all that hold codes, if fewer).

        Of these cells one is left out where the plane half-way between it and the nearest cell is farther from the vector
        than `reach` times the best code of the nearest cell: with 1 it holds no nearer code, if every code lies in the
        cell nearest to it, as k-means leaves them. The vectors that probe a cell are scored together. ValueError:
        `num_cells` below 1.
        """
        if num_cells < 1:
            raise ValueError(f"a search in {num_cells} cells; at least 1 is needed")
        if len(self.cells) == 1:
            return self.exact(x_NC)
        x_NC, num = x_NC.float(), min(num_cells, len(self.cells))
        ids_N, scores_N = _empty(x_NC)
        norms_N = quantizers.squared_norms(x_NC)
        for block in _blocks(len(x_NC), num, PAIRS):
            found = ids_N[block], scores_N[block]
            probed, planes, near_N = self._nearest_cell(x_NC[block], norms_N[block], num, *found)
            rows, rank = (planes[:, 1:] <= reach * near_N[:, None]).nonzero(as_tuple=True)
            self._score(x_NC[block], rows, probed[rows, rank + 1], *found)
        return ids_N, _distance(norms_N, scores_N)

    def _nearest_cell(
        self, x_NC: Tensor, norms_N: Tensor, num: int, ids_N: Tensor, scores_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search each vector's nearest cell, in place; `_probe`'s two, and how far the best code is: float32 (N,)."""
        probed, planes = self._probe(x_NC, num)
        self._score(x_NC, torch.arange(len(x_NC), device=x_NC.device), probed[:, 0], ids_N, scores_N)
        return probed, planes, (_distance(norms_N, scores_N) + ROUNDING * norms_N).sqrt_()

    def _score(self, x_NC: Tensor, rows: Tensor, cells: Tensor, ids_N: Tensor, scores_N: Tensor) -> None:
        """Compare the vectors `rows` with the codes of `cells`, pair by pair, and keep what is better in place."""
        rows = rows[torch.argsort(cells, stable=True)]
        ends = torch.bincount(cells, minlength=len(self.cells)).cumsum(0).tolist()
        for cell, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            codes = slice(self._starts[cell], self._starts[cell + 1])
            num_codes = min(codes.stop - codes.start, quantizers.CODE_BLOCK)
            for block in _blocks(last - first, max(num_codes, x_NC.shape[1])):
                mine = rows[first:last][block]
                score, local = quantizers.best_score(x_NC[mine], self._sorted[codes], self._sorted_half_norms[codes])
                found = self._order[codes][local]
                best, known = scores_N[mine], ids_N[mine]
                closer = (score < best) | ((score == best) & (found < known))
                scores_N[mine], ids_N[mine] = torch.where(closer, score, best), torch.where(closer, found, known)

    def needs(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """What `tree` needs to find the nearest code of each vector: cells, int64 (N,), and reach, float32 (N,)."""
        x_NC, num = x_NC.float(), len(self.cells)
        home_N = self.cell_of[self.exact(x_NC)[0]]
        cells_N = torch.ones(len(x_NC), dtype=torch.int64, device=x_NC.device)
        reach_N = torch.zeros(len(x_NC), device=x_NC.device)
        for block in _blocks(len(x_NC) if num > 1 else 0, num, PAIRS):
            mine = x_NC[block]
            probed, planes, near_N = self._nearest_cell(mine, quantizers.squared_norms(mine), num, *_empty(mine))
            rank_N = (probed == home_N[block, None]).int().argmax(-1)
            cells_N[block] = rank_N + 1
            reach_N[block] = planes.gather(1, rank_N[:, None])[:, 0] / near_N.clamp(min=TINY)
        return cells_N, reach_N

    def recalls(self, x_NC: Tensor) -> Tensor:
        """Share of the vectors whose nearest code lies in their 1, 2, … nearest cells: float64 (cells with codes,).

        So `recalls(x)[n - 1]` is the recall@1 of `tree(x, n)` against `exact(x)`. ValueError: no vectors.
        """
        if not len(x_NC):
            raise ValueError("recall on 0 vectors")
        cells_N, _ = self.needs(x_NC)
        return torch.bincount(cells_N - 1, minlength=len(self.cells)).cumsum(0).double() / len(x_NC)

    def probes_for(self, x_NC: Tensor, recall: float) -> Probes:
        """The least reach, and with it the fewest cells, that reach a recall on these vectors. See `Probes.reaching`."""
        return Probes.reaching(*self.needs(x_NC), recall)

    def _probe(self, x_NC: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """The nearest cells of each vector, nearest first, and how far the plane half-way to the nearest one is: int64 and
        float32 (N, num)."""
        probed = torch.empty(len(x_NC), num, dtype=torch.int64, device=x_NC.device)
        planes = torch.empty(len(x_NC), num, device=x_NC.device)
        for rows in _blocks(len(x_NC), len(self.cells)):
            scores = torch.addmm(self._cell_half_norms, x_NC[rows], self.cells.T, alpha=-1)
            best, probed[rows] = scores.topk(num, largest=False)
            home_N = probed[rows, 0]
            apart = torch.cdist(self.cells[home_N], self.cells) if self._apart is None else self._apart[home_N]
            apart = apart.gather(1, probed[rows])
            planes[rows] = (best - best[:, :1]) / apart.clamp(min=TINY)
        return probed, planes


def _candidates(low_NC: Tensor, low_KC: Tensor, half_norms_K: Tensor) -> Tensor:
    """The best `CANDIDATES` codes by scores of low precision, lowest id first: int64 (N, B)."""
    scores = low_NC.new_empty(len(low_NC), 0, dtype=torch.float32)
    ids = scores.to(torch.int64)
    for start in range(0, len(low_KC), CANDIDATE_BLOCK):
        block = slice(start, start + CANDIDATE_BLOCK)
        part = half_norms_K[block] - (low_NC @ low_KC[block].T).float()
        part, place = part.topk(min(CANDIDATES, part.shape[1]), largest=False)
        scores, ids = torch.cat([scores, part], 1), torch.cat([ids, place + start], 1)
        scores, place = scores.topk(min(CANDIDATES, scores.shape[1]), largest=False)
        ids = ids.gather(1, place)
    return ids.sort(-1).values


def _by_kernel(low_NC: Tensor, low_KC: Tensor, half_norms_K: Tensor) -> Tensor:
    """The same by triton, on a GPU."""
    from smalti.tokenizers.nearest_kernel import candidates

    return candidates(low_NC, low_KC, half_norms_K, CANDIDATES)


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `nearest_kernel` runs there."""
    if device.type != "cuda" or dtype != torch.bfloat16 or find_spec("triton") is None:
        return False
    from smalti.tokenizers.nearest_kernel import DEVICES

    return torch.cuda.get_device_capability(device) in DEVICES


def _blocks(num: int, width: int, most: int | None = None) -> list[slice]:
    """Rows in slices that have at most `most` numbers (`quantizers.SCRATCH_SCORES`) each when a row has `width`."""
    rows = max(1, (most or quantizers.SCRATCH_SCORES) // max(1, width))
    return [slice(at, min(num, at + rows)) for at in range(0, num, rows)]


def _empty(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    ids_N = torch.full((len(x_NC),), -1, dtype=torch.int64, device=x_NC.device)
    return ids_N, torch.full((len(x_NC),), math.inf, dtype=torch.float32, device=x_NC.device)


def _distance(norms_N: Tensor, scores_N: Tensor) -> Tensor:
    return (2 * scores_N + norms_N).clamp_(min=0)
