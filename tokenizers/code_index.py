"""Nearest codes of many vectors, exact or through the k-means tree.

Axis letters: N vectors, C their width, K codes, P cells, B candidates of a vector.
"""

from __future__ import annotations

import bisect
import math
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.tokenizers import flat_search

PAIRS = 1 << 24
"""(vector, cell) pairs that a tree search compares at once."""
APART = 1 << 26
"""Most distances between cells that an index stores; with more cells they are recomputed for each
block of vectors.
"""
ROUNDING = 1e-6
"""Error of a squared distance, relative to the squared norm of the vector."""
TINY = torch.finfo(torch.float32).tiny
SIGMAS = 1.645
"""Standard deviations below which 95 % of a normal distribution lies."""
CANDIDATE_BLOCK = 1 << 16
"""Codes sorted at once in a search for candidates; on a GPU few large sorts are faster."""
CANDIDATES = 16
"""Codes of each vector that are rescored in float32 after a search in lower precision."""
KERNEL_ROWS = 4096
"""Vectors that the GPU kernel searches at once: 0.3 GB of candidates at width 1152."""


class Probes(NamedTuple):
    """How much of the tree a search visits.

    Attributes:
        cells: nearest cells that are candidates, at least 1.
        reach: factor on the distance of the best code so far, beyond which a cell is skipped (see
            `CodeIndex.tree`).
        recall: recall@1 measured with these settings, in (0, 1].
    """

    cells: int
    reach: float
    recall: float

    @classmethod
    def reaching(cls, cells_N: Tensor, reach_N: Tensor, recall: float) -> Probes:
        """The smallest reach, and with it the fewest cells, for a recall.

        The recall holds at 95 % confidence for other vectors of the same distribution
        (`lower_bound`). With too few vectors to say so, the search finds all of them.

        Args:
            cells_N, reach_N: what `CodeIndex.needs` returns for held-out vectors.
            recall: share of vectors whose nearest code must be found, in (0, 1].

        Raises:
            ValueError: for a recall outside (0, 1], or no vectors.
        """
        if not 0 < recall <= 1:
            raise ValueError(f"recall is {recall}, expected a value in (0, 1]")
        if not len(cells_N):
            raise ValueError("recall cannot be measured on 0 vectors")
        num = len(cells_N)
        wanted = min(
            num,
            bisect.bisect_left(range(num + 1), recall, key=lambda found: lower_bound(found, num)),
        )
        reach = float(reach_N.sort().values[max(wanted, 1) - 1])
        found_N = reach_N <= reach
        return cls(int(cells_N[found_N].max()), reach * (1 + 1e-6), float(found_N.double().mean()))


def lower_bound(found: int, num: int) -> float:
    """Lower 95 % confidence bound of a share, seen `found` times in `num` (Wilson, one-sided)."""
    share = found / num
    square = SIGMAS**2 / num
    spread = SIGMAS * math.sqrt((share * (1 - share) + square / 4) / num)
    return (share + square / 2 - spread) / (1 + square)


class CodeIndex:
    """Search for the nearest of K codes.

    Codes are stored sorted by cell, with their half-norms, so that a cell is one GEMM against
    contiguous rows. Vectors must be on the device of the codes, where results are too.

    Args:
        codes_KC: codes (K, C), K >= 1.
        cells_PC: centres of the cells (P, C), for the tree search.
        cell_of_K: cell of each code, int64 (K,) in [0, P).
        probes: how much of the tree `nearest` visits; None is exact search.

    Raises:
        ValueError: for shapes that do not match.
    """

    def __init__(
        self,
        codes_KC: Tensor,
        cells_PC: Tensor | None = None,
        cell_of_K: Tensor | None = None,
        probes: Probes | None = None,
    ) -> None:
        if codes_KC.ndim != 2 or not len(codes_KC):
            raise ValueError(
                f"CodeIndex wants codes (K, C) with K >= 1, got {tuple(codes_KC.shape)}"
            )
        self.codes = codes_KC.float()
        self.probes = probes
        if cells_PC is None or cell_of_K is None:
            cells_PC = self.codes.mean(0, keepdim=True)
            cell_of_K = codes_KC.new_zeros(len(codes_KC), dtype=torch.int64)
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
        # codes that lie in the order of their cells are not copied
        in_place = bool((cell_of_K.diff() >= 0).all())
        self._sorted = self.codes if in_place else self.codes[self._order]
        self._half_norms = flat_search.squared_norms(self.codes) / 2
        self._sorted_half_norms = self._half_norms[self._order]
        self._cell_half_norms = flat_search.squared_norms(self.cells) / 2
        self._apart = torch.cdist(self.cells, self.cells) if len(self.cells) ** 2 <= APART else None
        self._starts = [0, *sizes_P[full].cumsum(0).tolist()]
        self._low: dict[torch.dtype, Tensor] = {}

    def exact(self, x_NC: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Nearest code of each vector (N, C), and its squared distance.

        In bfloat16 the best `CANDIDATES` codes are rescored in float32: the result is exact unless
        more codes than that lie within its rounding. On an A100 or H100 with triton,
        `nearest_kernel` makes the scores without storing them; there, three codes of one tile may
        also hide a fourth. The index keeps its copy of the codes in that dtype.

        Args:
            dtype: precision of the scores.

        Returns:
            Codes, int64 (N,), ties take the lowest; squared distances, float32 (N,).
        """
        x_NC = x_NC.float()
        block = min(len(self.codes), flat_search.CODE_BLOCK)
        ids_N, scores_N = _empty(x_NC)
        if dtype == torch.float32:
            for rows in _blocks(len(x_NC), block):
                scores_N[rows], ids_N[rows] = flat_search.best_score(
                    x_NC[rows], self.codes, self._half_norms
                )
            return ids_N, _distance(flat_search.squared_norms(x_NC), scores_N)
        if dtype not in self._low:
            self._low[dtype] = self.codes.to(dtype).contiguous()
        low_KC = self._low[dtype]
        low_NC = x_NC.to(dtype).contiguous()
        kernel = _has_kernel(x_NC.device, dtype)
        width = max(x_NC.shape[1] * CANDIDATES, min(len(self.codes), CANDIDATE_BLOCK))
        for rows in _blocks(len(x_NC), 1, KERNEL_ROWS) if kernel else _blocks(len(x_NC), width):
            found_NB = (_by_kernel if kernel else _candidates)(
                low_NC[rows], low_KC, self._half_norms
            )
            dots_NB = torch.einsum("nc,nbc->nb", x_NC[rows], self.codes[found_NB])
            scores_N[rows], place_N = (self._half_norms[found_NB] - dots_NB).min(-1)
            ids_N[rows] = found_NB.gather(1, place_N[:, None])[:, 0]
        return ids_N, _distance(flat_search.squared_norms(x_NC), scores_N)

    def nearest(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """As `exact`, by the tree search that `probes` describe; exact without them."""
        return (
            self.exact(x_NC)
            if self.probes is None
            else self.tree(x_NC, self.probes.cells, self.probes.reach)
        )

    def tree(self, x_NC: Tensor, num_cells: int, reach: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `exact`, among the codes of the `num_cells` cells nearest to each vector.

        A cell is skipped if the plane half-way between it and the nearest cell is farther from the
        vector than `reach` times the distance to the best code of the nearest cell. With `reach` 1
        a skipped cell holds no nearer code, provided that every code lies in the cell nearest to
        it, as after k-means.

        Raises:
            ValueError: for `num_cells` below 1.
        """
        if num_cells < 1:
            raise ValueError(f"num_cells is {num_cells}, expected at least 1")
        if len(self.cells) == 1:
            return self.exact(x_NC)
        x_NC = x_NC.float()
        num = min(num_cells, len(self.cells))
        ids_N, scores_N = _empty(x_NC)
        norms_N = flat_search.squared_norms(x_NC)
        for block in _blocks(len(x_NC), num, PAIRS):
            found = ids_N[block], scores_N[block]
            probed, planes, near_N = self._nearest_cell(x_NC[block], norms_N[block], num, *found)
            rows, rank = (planes[:, 1:] <= reach * near_N[:, None]).nonzero(as_tuple=True)
            self._score(x_NC[block], rows, probed[rows, rank + 1], *found)
        return ids_N, _distance(norms_N, scores_N)

    def _nearest_cell(
        self, x_NC: Tensor, norms_N: Tensor, num: int, ids_N: Tensor, scores_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search each vector's nearest cell, in place.

        Returns:
            What `_probe` returns, and the distance of the best code, float32 (N,).
        """
        probed, planes = self._probe(x_NC, num)
        self._score(
            x_NC, torch.arange(len(x_NC), device=x_NC.device), probed[:, 0], ids_N, scores_N
        )
        return probed, planes, (_distance(norms_N, scores_N) + ROUNDING * norms_N).sqrt_()

    def _score(
        self, x_NC: Tensor, rows: Tensor, cells: Tensor, ids_N: Tensor, scores_N: Tensor
    ) -> None:
        """Compare vectors `rows` with the codes of `cells`, pairwise; better codes are written in
        place.
        """
        rows = rows[torch.argsort(cells, stable=True)]
        ends = torch.bincount(cells, minlength=len(self.cells)).cumsum(0).tolist()
        for cell, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            codes = slice(self._starts[cell], self._starts[cell + 1])
            num_codes = min(codes.stop - codes.start, flat_search.CODE_BLOCK)
            for block in _blocks(last - first, max(num_codes, x_NC.shape[1])):
                mine = rows[first:last][block]
                score, local = flat_search.best_score(
                    x_NC[mine], self._sorted[codes], self._sorted_half_norms[codes]
                )
                found = self._order[codes][local]
                best = scores_N[mine]
                known = ids_N[mine]
                closer = (score < best) | ((score == best) & (found < known))
                scores_N[mine] = torch.where(closer, score, best)
                ids_N[mine] = torch.where(closer, found, known)

    def needs(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """The cells, int64 (N,), and the reach, float32 (N,), with which `tree` finds the nearest
        code.
        """
        x_NC = x_NC.float()
        num = len(self.cells)
        home_N = self.cell_of[self.exact(x_NC)[0]]
        cells_N = torch.ones(len(x_NC), dtype=torch.int64, device=x_NC.device)
        reach_N = torch.zeros(len(x_NC), device=x_NC.device)
        for block in _blocks(len(x_NC) if num > 1 else 0, num, PAIRS):
            mine = x_NC[block]
            probed, planes, near_N = self._nearest_cell(
                mine, flat_search.squared_norms(mine), num, *_empty(mine)
            )
            rank_N = (probed == home_N[block, None]).int().argmax(-1)
            cells_N[block] = rank_N + 1
            reach_N[block] = planes.gather(1, rank_N[:, None])[:, 0] / near_N.clamp(min=TINY)
        return cells_N, reach_N

    def recalls(self, x_NC: Tensor) -> Tensor:
        """Recall@1 of `tree(x, n)` against `exact(x)` at index n − 1: float64 (cells that hold
        codes,).

        Raises:
            ValueError: for no vectors.
        """
        if not len(x_NC):
            raise ValueError("recall cannot be measured on 0 vectors")
        cells_N, _ = self.needs(x_NC)
        return torch.bincount(cells_N - 1, minlength=len(self.cells)).cumsum(0).double() / len(x_NC)

    def probes_for(self, x_NC: Tensor, recall: float) -> Probes:
        """The smallest search that reaches a recall on these vectors. See `Probes.reaching`."""
        return Probes.reaching(*self.needs(x_NC), recall)

    def _probe(self, x_NC: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """The nearest cells of each vector, and the distance of the planes half-way to them.

        Returns:
            Cells, int64 (N, num), nearest first; distances, float32 (N, num).
        """
        probed = torch.empty(len(x_NC), num, dtype=torch.int64, device=x_NC.device)
        planes = torch.empty(len(x_NC), num, device=x_NC.device)
        for rows in _blocks(len(x_NC), len(self.cells)):
            scores = torch.addmm(self._cell_half_norms, x_NC[rows], self.cells.T, alpha=-1)
            best, probed[rows] = scores.topk(num, largest=False)
            home_N = probed[rows, 0]
            apart = (
                torch.cdist(self.cells[home_N], self.cells)
                if self._apart is None
                else self._apart[home_N]
            )
            apart = apart.gather(1, probed[rows])
            planes[rows] = (best - best[:, :1]) / apart.clamp(min=TINY)
        return probed, planes


def _candidates(low_NC: Tensor, low_KC: Tensor, half_norms_K: Tensor) -> Tensor:
    """The best `CANDIDATES` codes by low-precision scores, lowest id first: int64 (N, B)."""
    scores = low_NC.new_empty(len(low_NC), 0, dtype=torch.float32)
    ids = scores.to(torch.int64)
    for start in range(0, len(low_KC), CANDIDATE_BLOCK):
        block = slice(start, start + CANDIDATE_BLOCK)
        part = half_norms_K[block] - (low_NC @ low_KC[block].T).float()
        part, place = part.topk(min(CANDIDATES, part.shape[1]), largest=False)
        scores = torch.cat([scores, part], 1)
        ids = torch.cat([ids, place + start], 1)
        scores, place = scores.topk(min(CANDIDATES, scores.shape[1]), largest=False)
        ids = ids.gather(1, place)
    return ids.sort(-1).values


def _by_kernel(low_NC: Tensor, low_KC: Tensor, half_norms_K: Tensor) -> Tensor:
    """As `_candidates`, by the triton kernel."""
    from smalti.tokenizers.nearest_kernel import candidates

    return candidates(low_NC, low_KC, half_norms_K, CANDIDATES)


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `nearest_kernel` runs on this device in this dtype."""
    if device.type != "cuda" or dtype != torch.bfloat16 or find_spec("triton") is None:
        return False
    from smalti.tokenizers.nearest_kernel import DEVICES

    return torch.cuda.get_device_capability(device) in DEVICES


def _blocks(num: int, width: int, most: int | None = None) -> list[slice]:
    """Slices of `num` rows of `width` numbers, at most `most` numbers each (default
    `SCRATCH_SCORES`).
    """
    rows = max(1, (most or flat_search.SCRATCH_SCORES) // max(1, width))
    return [slice(at, min(num, at + rows)) for at in range(0, num, rows)]


def _empty(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    ids_N = torch.full((len(x_NC),), -1, dtype=torch.int64, device=x_NC.device)
    return ids_N, torch.full((len(x_NC),), math.inf, dtype=torch.float32, device=x_NC.device)


def _distance(norms_N: Tensor, scores_N: Tensor) -> Tensor:
    return (2 * scores_N + norms_N).clamp_(min=0)
