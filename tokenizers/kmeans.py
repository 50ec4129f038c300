"""k-means on one shard or one cell; the caller sums statistics over workers.

Axis letters: N vectors, C their width, K centroids. Sums are float64 and added in a fixed order.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from smalti.tokenizers.flat_search import search

Seeding = Literal["auto", "plusplus", "random"]
"""How centroids are seeded.

`auto`: k-means++ up to `PLUSPLUS_MAX` centroids, random vectors above.
"""
SUM_NUMBERS = 1 << 17
"""Numbers converted to float64 at once while sums are taken: they fit in cache."""
BLOCK_NUMBERS = 1 << 16
"""Numbers that k-means++ compares at once: in cache a difference costs a ninth."""
NAMED_ROWS = 1 << 12
"""Rows hashed at once to find duplicates."""
PLUSPLUS_MAX = 512
"""Most centroids that k-means++ seeds in `auto`: each seed is a pass over the vectors."""


def assign(x_NC: Tensor, c_KC: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every vector and its squared distance: int64 (N,), float32 (N,).

    See `quantizers.search`.
    """
    return search(x_NC, c_KC, chunk)


def by_plusplus(seeding: Seeding, num: int) -> bool:
    """Whether `num` centroids are seeded by k-means++."""
    return seeding == "plusplus" or (seeding == "auto" and num <= PLUSPLUS_MAX)


def seed(
    x_NC: Tensor, num: int, generator: torch.Generator | None = None, seeding: Seeding = "auto"
) -> Tensor:
    """`num` initial centroids: (num, C)."""
    return (seed_plusplus if by_plusplus(seeding, num) else seed_random)(x_NC, num, generator)


def seed_random(x_NC: Tensor, num: int, generator: torch.Generator | None = None) -> Tensor:
    """`num` vectors drawn without replacement: (num, C).

    They are distinct if there are `num` distinct vectors. With fewer vectors than `num` all are
    used, and repeated.
    """
    order = torch.randperm(len(x_NC), generator=generator)
    if len(x_NC) < num:
        order = order.repeat(-(-num // max(1, len(x_NC))))
    chosen = x_NC[order[:num].to(x_NC.device)]
    known = set[bytes]()
    doubles = torch.ones(num, dtype=torch.bool)
    doubles[first_distinct(chosen, torch.arange(num), num, known)] = False
    fresh = first_distinct(x_NC, order[num:], int(doubles.sum()), known)
    places = doubles.nonzero().flatten()[: len(fresh)]
    chosen[places.to(x_NC.device)] = x_NC[fresh.to(x_NC.device)]
    return chosen


def row_names(x_NC: Tensor) -> Iterator[bytes]:
    """A 16-byte hash of each row, equal for equal rows."""
    for rows in x_NC.float().split(NAMED_ROWS):
        for row in (rows.cpu() + 0.0).numpy():  # +0 and -0 are equal
            yield hashlib.blake2b(row, digest_size=16).digest()


def first_distinct(x_NC: Tensor, ids_N: Tensor, num: int, known: set[bytes]) -> Tensor:
    """The first `num` of rows `ids_N` that are distinct and not `known`: int64 (at most num,).

    Args:
        known: hashes of rows (`row_names`); those of the rows found are added.
    """
    found: list[int] = []
    for ids in ids_N.split(NAMED_ROWS) if num else ():
        for row, name in zip(ids.tolist(), row_names(x_NC[ids.to(x_NC.device)]), strict=True):
            if name not in known:
                known.add(name)
                found.append(row)
                if len(found) == num:
                    return torch.tensor(found)
    return torch.tensor(found, dtype=torch.int64)


def seed_plusplus(x_NC: Tensor, num: int, generator: torch.Generator | None = None) -> Tensor:
    """k-means++ seeds (Arthur & Vassilvitskii 2007): (num, C).

    Each seed is drawn with probability ∝ its squared distance to the seeds before it, one pass over
    the vectors per seed. Once every vector coincides with a seed, draws are uniform.
    """
    draw = torch.rand(num, generator=generator, dtype=torch.float64)
    x_NC = x_NC.float()
    seeds = x_NC.new_empty(num, x_NC.shape[1])
    distance_N = torch.full((len(x_NC),), float("inf"), dtype=torch.float64, device=x_NC.device)
    for k in range(num):
        total = distance_N.sum()
        if k and total > 0:
            place = torch.searchsorted(distance_N.cumsum(0), draw[k].to(total) * total)
        else:
            place = torch.tensor(int(draw[k] * len(x_NC)))
        seeds[k] = x_NC[min(int(place), len(x_NC) - 1)]
        distance_N = torch.minimum(distance_N, _to_one(x_NC, seeds[k]).double())
    return seeds


def _to_one(x_NC: Tensor, c_C: Tensor) -> Tensor:
    """Squared distance of every vector to one, exactly 0 where they are equal: float32 (N,)."""
    distance_N = x_NC.new_empty(len(x_NC))
    step = (
        max(1, BLOCK_NUMBERS // max(1, x_NC.shape[1])) if x_NC.device.type == "cpu" else len(x_NC)
    )
    for start in range(0, len(x_NC), step):
        rows = slice(start, start + step)
        torch.sum((x_NC[rows] - c_C).square_(), -1, out=distance_N[rows])
    return distance_N


def lloyd_stats(x_NC: Tensor, ids_N: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Sum and count of the vectors of each centroid: float64 (num, C), int64 (num,)."""
    sums_KC = torch.zeros(num, x_NC.shape[1], dtype=torch.float64, device=x_NC.device)
    add_up(sums_KC, x_NC, ids_N)
    return sums_KC, torch.bincount(ids_N, minlength=num)


def add_up(sums_KC: Tensor, x_NC: Tensor, ids_N: Tensor) -> None:
    """Add each vector to the row of its id, in the order of the vectors: float64 (K, C), changed in
    place.
    """
    rows = max(1, SUM_NUMBERS // max(1, x_NC.shape[1])) if x_NC.device.type == "cpu" else len(x_NC)
    for start in range(0, len(x_NC), rows):
        part = slice(start, start + rows)
        sums_KC.index_add_(0, ids_N[part], x_NC[part].double())


def move(c_KC: Tensor, sums_KC: Tensor, counts_K: Tensor, spherical: bool = False) -> Tensor:
    """Means of the vectors of each centroid; centroids without vectors are kept.

    Args:
        spherical: normalize the means; a centroid whose vectors cancel out is kept.
    """
    means = sums_KC / counts_K.clamp(min=1)[:, None]
    moved = torch.where(counts_K[:, None] > 0, means, c_KC.double()).float()
    if not spherical:
        return moved
    norms_K = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    return torch.where(norms_K > 0, moved / norms_K, c_KC)


def on_sphere(x_NC: Tensor) -> Tensor:
    """Normalize vectors in place, without zero vectors (then a copy)."""
    norms_N = torch.linalg.vector_norm(x_NC, dim=-1, keepdim=True)
    some_N = norms_N[:, 0] > 0
    if not bool(some_N.all()):
        x_NC = x_NC[some_N]
        norms_N = norms_N[some_N]
    return x_NC.div_(norms_N)


def reseed_empty(
    c_KC: Tensor, counts_K: Tensor, x_NC: Tensor, distance_N: Tensor
) -> tuple[Tensor, int]:
    """Move centroids without vectors to the vectors farthest from their centroid.

    Only distinct vectors at a positive distance are used, each once: duplicates stay empty.

    Returns:
        The centroids, and how many moved.
    """
    places, rows = fresh_for_empty(counts_K, x_NC, distance_N)
    if len(places):
        c_KC = c_KC.clone()
        c_KC[places] = rows
    return c_KC, len(places)


def fresh_for_empty(counts_K: Tensor, x_NC: Tensor, distance_N: Tensor) -> tuple[Tensor, Tensor]:
    """The centroids that `reseed_empty` moves, int64 (E,), and their new places, float32 (E, C)."""
    empty = (counts_K == 0).nonzero().flatten()
    far = distance_N.sort(descending=True, stable=True).indices[: 4 * len(empty)]
    far = far[distance_N[far] > 0]
    far = first_distinct(x_NC, far.cpu(), len(empty), set()).to(x_NC.device)
    return empty[: len(far)], x_NC[far].float()


def kmeans(
    x_NC: Tensor,
    num: int,
    iterations: int,
    generator: torch.Generator | None = None,
    spherical: bool = False,
    seeding: Seeding = "auto",
) -> Tensor:
    """Centroids by Lloyd's iterations: float32 (num, C), finite.

    Empty clusters are re-seeded on far vectors at every iteration. With fewer distinct vectors than
    `num`, centroids repeat. Spherical k-means ignores vectors of norm 0.

    Raises:
        ValueError: for no vectors, or NaN or Inf.
    """
    if not len(x_NC) or num < 1:
        raise ValueError(f"k-means of {len(x_NC)} vectors into {num} clusters")
    x_NC = x_NC.to(torch.float32, copy=spherical)
    if not bool(torch.isfinite(torch.stack(torch.aminmax(x_NC))).all()):
        raise ValueError("k-means of vectors with NaN or Inf")
    if spherical:
        x_NC = on_sphere(x_NC)
        if not len(x_NC):
            raise ValueError("spherical k-means of zero vectors, which have no direction")
    c_KC = seed(x_NC, num, generator, seeding)
    for _ in range(iterations):
        ids_N, distance_N = assign(x_NC, c_KC)
        sums_KC, counts_K = lloyd_stats(x_NC, ids_N, num)
        c_KC = move(c_KC, sums_KC, counts_K, spherical)
        c_KC, _ = reseed_empty(c_KC, counts_K, x_NC, distance_N)
    return c_KC


def allocate(total: int, cell_sizes: Sequence[int], most: Sequence[int] | None = None) -> list[int]:
    """Divide `total` centroids among cells in proportion to their sizes.

    Largest remainder: at least 1 for a cell with vectors, 0 for an empty one, and at most `most` of
    a cell where the cells together can take `total`; the excess goes to the others in proportion.

    Args:
        most: upper bound for each cell; default: its vectors.

    Returns:
        Centroids of each cell; the sum is exactly `total`.

    Raises:
        ValueError: for no vectors, or fewer centroids than cells with vectors.
    """
    cells = _open_cells(total, cell_sizes)
    most = cell_sizes if most is None else most
    capped = sum(most[i] for i in cells) >= total
    quota = _quotas(
        total, {i: cell_sizes[i] for i in cells}, most if capped else [total] * len(most)
    )
    share = {i: max(1, min(int(quota[i]), most[i] if capped else int(quota[i]))) for i in cells}
    missing = total - sum(share.values())
    sign = 1 if missing > 0 else -1
    heap = [(sign * (share[i] - quota[i]), i) for i in cells]
    heapq.heapify(heap)
    while missing:
        need, i = heapq.heappop(heap)
        full = sign > 0 and capped and share[i] >= most[i]
        if full or (sign < 0 and share[i] <= 1):
            continue
        share[i] += sign
        missing -= sign
        heapq.heappush(heap, (need + 1, i))
    return [share.get(i, 0) for i in range(len(cell_sizes))]


def _open_cells(total: int, cell_sizes: Sequence[int]) -> list[int]:
    """Cells that hold vectors; ValueError if there are none, or more than `total`."""
    cells = [i for i, size in enumerate(cell_sizes) if size > 0]
    if not cells or total < len(cells):
        raise ValueError(
            f"{total} centroids for {len(cells)} cells that hold vectors; at least one each is needed"
        )
    return cells


def _quotas(total: int, sizes: Mapping[int, int], most: Sequence[int]) -> dict[int, float]:
    """`total` divided in proportion to the sizes, none above `most`."""
    full: dict[int, float] = {}
    while True:
        rest = total - sum(full.values())
        open_sizes = {i: size for i, size in sizes.items() if i not in full}
        vectors = sum(open_sizes.values())
        quota = {i: rest * size / vectors for i, size in open_sizes.items()}
        over = {i: float(most[i]) for i in quota if quota[i] > most[i]}
        if not over:
            return quota | full
        full |= over


def share_equally(
    total: int, cell_sizes: Sequence[int], most: Sequence[int] | None = None
) -> list[int]:
    """Divide `total` centroids equally (within one) among cells that hold vectors.

    Arguments, result and errors are those of `allocate`.
    """
    open_cells = _open_cells(total, cell_sizes)
    most = cell_sizes if most is None else most
    share = [0] * len(cell_sizes)
    missing = total
    if sum(most[i] for i in open_cells) >= total:
        by_most = sorted(open_cells, key=lambda i: most[i])
        full = 0
        while full < len(by_most) and most[by_most[full]] * (len(by_most) - full) <= missing:
            share[by_most[full]] = most[by_most[full]]
            missing -= share[by_most[full]]
            full += 1
        open_cells = sorted(by_most[full:])
    for place, i in enumerate(open_cells):
        share[i] = missing // len(open_cells) + (place < missing % len(open_cells))
    return share
