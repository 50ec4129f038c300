"""k-means over feature shards on Ray: the passes that the stage `codebook` is made of.

Axis letters: N vectors, C their width, K codes, P cells of the first level. The vectors are cut into chunks (whole
shards) by their number alone; a chunk is a task; partial sums are float64 and added in the order of the chunks. So the
result does not depend on how many tasks run at once. A pass over the data is what costs: each function says how many.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalti import shards, storage
from smalti.errors import DataError, SmaltiError
from smalti.tokenizers import kmeans

MAX_CHUNKS = 64
CHUNK_VECTORS = 65_536  # at least, so that a task is worth its start
PROBES = 4  # cells searched for a vector
FAR_A_CHUNK = 256  # candidates for codes without a vector


@dataclass(frozen=True)
class Chunk:
    """Some whole shards of a features artifact: (key, rows) each."""

    path: str
    parts: tuple[tuple[str, int], ...]

    def vectors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, float32 (n, C)) of each shard. Errors: DataError, a vector that is not finite."""
        for key, _ in self.parts:
            x_NC = torch.from_numpy(shards.vectors(shards.read_shard(self.path, key, ["vector"])).astype(np.float32))
            if not bool(torch.isfinite(x_NC.sum())):  # one sum tells: float16 cannot overflow it
                raise DataError(f"{shards.shard_path(self.path, key)} holds NaN or Inf. Make the features again.")
            yield key, x_NC


@dataclass(frozen=True)
class Tree:
    """Codes in cells: float32 (P, C) and (K, C), int64 (K,). With one cell, a flat codebook."""

    cells: Tensor
    codes: Tensor
    cell_of: Tensor

    def with_codes(self, codes_KC: Tensor) -> Tree:
        return replace(self, codes=codes_KC)


@dataclass
class PassStats:
    """What a pass over vectors found. `far` are the vectors with the largest distances, farthest first."""

    counts: Tensor
    distance_sum: float = 0.0
    sums: Tensor | None = None
    far: Tensor = field(default_factory=lambda: torch.empty(0))
    far_distance: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def distortion(self) -> float:
        """Mean squared distance of a vector to its code."""
        return self.distance_sum / max(1, int(self.counts.sum()))


def chunks(path: str, split: str) -> list[Chunk]:
    """The shards of a split in at most `MAX_CHUNKS` chunks of about the same number of vectors, in order."""
    rows = [(key, shards.shard_rows(path, key)) for key in shards.list_shards(path, split)]
    target = max(CHUNK_VECTORS, -(-sum(count for _, count in rows) // MAX_CHUNKS))
    found: list[list[tuple[str, int]]] = [[]]
    for part in rows:
        if sum(count for _, count in found[-1]) >= target:
            found.append([])
        found[-1].append(part)
    return [Chunk(path, tuple(parts)) for parts in found if parts]


def in_order(
    task: Callable[..., Any], items: Sequence[tuple[Any, ...]], workers: int, gpus: float = 0
) -> Iterator[Any]:
    """`task(*item)` for each item as Ray tasks, at most `workers` at once; results in the order of the items.

    A SmaltiError of a task is raised here as it was.
    """
    import ray
    from ray.exceptions import RayTaskError

    remote = ray.remote(num_cpus=1, num_gpus=gpus)(task)
    waiting: list[Any] = []
    for number in range(len(items)):
        while len(waiting) < min(len(items), number + workers):
            waiting.append(remote.remote(*items[len(waiting)]))
        try:
            yield ray.get(waiting[number])
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, SmaltiError) else error) from None
        waiting[number] = None


def assign(x_NC: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """Code of each vector and its squared distance: int64 (N,), float32 (N,).

    Exact with one cell; else among the codes of the `PROBES` nearest cells. Ties take the lowest code.
    """
    if len(tree.cells) == 1:
        return kmeans.assign(x_NC, tree.codes)
    order_K = torch.argsort(tree.cell_of, stable=True)
    sizes_P = torch.bincount(tree.cell_of, minlength=len(tree.cells))
    starts_P = torch.cumsum(sizes_P, 0) - sizes_P
    full = (sizes_P > 0).nonzero().flatten()
    cells = tree.cells[full]
    scores = torch.addmm(cells.square().sum(-1) / 2, x_NC, cells.T, alpha=-1)
    probed_NB = full[scores.topk(min(PROBES, len(full)), largest=False).indices]
    best_N = torch.full((len(x_NC),), float("inf"))
    ids_N = torch.full((len(x_NC),), len(tree.codes))
    for cell in probed_NB.unique().tolist():
        rows = (probed_NB == cell).any(-1).nonzero().flatten()
        members = order_K[starts_P[cell] : starts_P[cell] + sizes_P[cell]]
        local, distance = kmeans.assign(x_NC[rows], tree.codes[members])
        found = members[local]
        closer = (distance < best_N[rows]) | ((distance == best_N[rows]) & (found < ids_N[rows]))
        best_N[rows[closer]], ids_N[rows[closer]] = distance[closer], found[closer]
    return ids_N, best_N


def full_pass(parts: Sequence[Chunk], tree: Tree, workers: int, *, sums: bool) -> PassStats:
    """Assign every vector: counts, distances, the farthest vectors and, if asked, the sums. One pass."""
    import ray

    num, width = tree.codes.shape
    shared = ray.put(tree)
    total = PassStats(torch.zeros(num, dtype=torch.int64))
    total.sums = torch.zeros(num, width, dtype=torch.float64) if sums else None
    far: list[tuple[Tensor, Tensor]] = []
    for counts_K, distance, used, used_sums, far_NC, far_N in in_order(
        _chunk_stats, [(chunk, shared, sums) for chunk in parts], workers
    ):
        total.counts += counts_K
        total.distance_sum += distance
        if total.sums is not None:
            total.sums[used] += used_sums
        far.append((far_NC, far_N))
    if far:
        distances = torch.cat([one[1] for one in far])
        order = torch.argsort(distances, descending=True, stable=True)
        total.far, total.far_distance = torch.cat([one[0] for one in far])[order], distances[order]
    return total


def _chunk_stats(chunk: Chunk, tree: Tree, sums: bool) -> tuple[Any, ...]:
    """Task of `full_pass`: (counts, sum of distances, codes that were used, their sums, far vectors, distances)."""
    num, width = tree.codes.shape
    counts_K = torch.zeros(num, dtype=torch.int64)
    sums_KC = torch.zeros(num, width, dtype=torch.float64) if sums else None
    distance_sum, far_NC, far_N = 0.0, torch.empty(0, width), torch.empty(0)
    for _, x_NC in chunk.vectors():
        ids_N, distance_N = assign(x_NC, tree)
        if sums_KC is not None:
            part_sums, part_counts = kmeans.lloyd_stats(x_NC, ids_N, num)
            sums_KC += part_sums
        else:
            part_counts = torch.bincount(ids_N, minlength=num)
        counts_K += part_counts
        distance_sum += float(distance_N.double().sum())
        far_N, far_NC = torch.cat([far_N, distance_N]), torch.cat([far_NC, x_NC])
        top = torch.argsort(far_N, descending=True, stable=True)[:FAR_A_CHUNK]
        far_N, far_NC = far_N[top], far_NC[top].clone()
    used = counts_K.nonzero().flatten()
    return counts_K, distance_sum, used, sums_KC[used] if sums_KC is not None else None, far_NC, far_N


def lloyd(parts: Sequence[Chunk], tree: Tree, workers: int) -> tuple[Tree, PassStats, int]:
    """One Lloyd iteration over all vectors: (tree with moved codes, stats before the move, codes re-seeded). One pass.

    Codes without a vector go to the vectors farthest from theirs.
    """
    stats = full_pass(parts, tree, workers, sums=True)
    assert stats.sums is not None
    moved = kmeans.move(tree.codes, stats.sums, stats.counts)
    moved, reseeded = kmeans.reseed_empty(moved, stats.counts, stats.far, stats.far_distance)
    stats.sums = None
    return place(tree.with_codes(moved), stats.counts == 0), stats, reseeded


def place(tree: Tree, which_K: Tensor) -> Tree:
    """The tree with the chosen codes in the cells that are nearest to them now."""
    if len(tree.cells) == 1 or not bool(which_K.any()):
        return tree
    cell_of_K = tree.cell_of.clone()
    cell_of_K[which_K] = kmeans.assign(tree.codes[which_K], tree.cells)[0]
    return replace(tree, cell_of=cell_of_K)


def sample(parts: Sequence[Chunk], num: int, seed: int, workers: int) -> Tensor:
    """A seeded sample of at most `num` vectors, each shard in proportion to its size: float32 (n, C). One pass."""
    rows = [count for chunk in parts for _, count in chunk.parts]
    total = sum(rows)
    quotas = rows if num >= total else kmeans.allocate(max(num, sum(count > 0 for count in rows)), rows)
    items, at = [], 0
    for chunk in parts:
        items.append((chunk, tuple(quotas[at : at + len(chunk.parts)]), seed, at))
        at += len(chunk.parts)
    return torch.cat(list(in_order(_chunk_sample, items, workers)))


def _chunk_sample(chunk: Chunk, quotas: tuple[int, ...], seed: int, first: int) -> Tensor:
    """Task of `sample`."""
    taken = []
    for offset, ((_, x_NC), quota) in enumerate(zip(chunk.vectors(), quotas, strict=True)):
        rng = np.random.default_rng([abs(seed), first + offset])
        taken.append(x_NC[torch.from_numpy(np.sort(rng.permutation(len(x_NC))[:quota]))])
    return torch.cat(taken)


# ---- cells: the vectors of each cell together ----------------------------------------------------------------------


def write_cells(parts: Sequence[Chunk], cells_PC: Tensor, folder: str, workers: int) -> Tensor:
    """Write every shard's vectors sorted by their nearest cell; returns the cells' sizes, int64 (P,). One pass.

    A file a shard: float16 rows in `<folder>/<split>-<number>.bin`, where each cell starts in `….npy`. Files that
    stand are kept.
    """
    import ray

    sizes_P = torch.zeros(len(cells_PC), dtype=torch.int64)
    shared = ray.put(cells_PC)
    for part in in_order(_chunk_cells, [(chunk, shared, folder) for chunk in parts], workers):
        sizes_P += part
    return sizes_P


def _chunk_cells(chunk: Chunk, cells_PC: Tensor, folder: str) -> Tensor:
    """Task of `write_cells`."""
    sizes_P = torch.zeros(len(cells_PC), dtype=torch.int64)
    for key, rows in chunk.parts:
        name = storage.join(folder, key.replace("/", "-"))
        if not storage.exists(f"{name}.npy"):
            _, x_NC = next(Chunk(chunk.path, ((key, rows),)).vectors())
            ids_N, _ = kmeans.assign(x_NC, cells_PC)
            sorted_NC = x_NC[torch.argsort(ids_N, stable=True)].to(torch.float16)  # exact: they came as float16
            counts_P = torch.bincount(ids_N, minlength=len(cells_PC))
            storage.write_atomic(f"{name}.bin", sorted_NC.numpy().tobytes())
            storage.write_atomic(f"{name}.npy", _npy(np.concatenate([[0], np.cumsum(counts_P.numpy())])))
        sizes_P += torch.from_numpy(np.diff(_starts(name)))
    return sizes_P


def read_cells(names: Sequence[str], first: int, last: int, width: int) -> tuple[Tensor, list[Tensor]]:
    """Sizes (last − first,) and vectors, float32 (n, C), of the cells first … last − 1, in the order of the files."""
    pieces: list[list[np.ndarray]] = [[] for _ in range(first, last)]
    for name in names:
        starts = _starts(name)
        low, high = int(starts[first]), int(starts[last])
        with storage.open_read(f"{name}.bin") as file:
            file.seek(low * width * 2)
            rows = np.frombuffer(file.read((high - low) * width * 2), np.float16).reshape(-1, width)
        if len(rows) != high - low:
            raise DataError(f"{name}.bin is shorter than its index says. Remove its folder and run the stage again.")
        for cell in range(first, last):
            pieces[cell - first].append(rows[starts[cell] - low : starts[cell + 1] - low])
    vectors = [torch.from_numpy(np.concatenate(parts).astype(np.float32)) for parts in pieces]
    return torch.tensor([len(x) for x in vectors]), vectors


def fine(names: Sequence[str], first: int, shares: Sequence[int], width: int, iterations: int, seed: int) -> Tensor:
    """Codes of some cells, `shares[i]` in cell first + i, one after the other: float32 (sum, C). A task."""
    _, vectors = read_cells(names, first, first + len(shares), width)
    found = [torch.empty(0, width)]
    for offset, (num, x_NC) in enumerate(zip(shares, vectors, strict=True)):
        if num:
            generator = torch.Generator().manual_seed(_mix(seed, first + offset))
            found.append(kmeans.kmeans(x_NC, num, iterations, generator))
    return torch.cat(found)


def _mix(seed: int, cell: int) -> int:
    return int(np.random.SeedSequence([abs(seed), cell]).generate_state(1, np.uint64)[0] >> 1)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _starts(name: str) -> np.ndarray:
    return np.load(io.BytesIO(storage.read_bytes(f"{name}.npy")), allow_pickle=False)


# ---- distinct codes ------------------------------------------------------------------------------------------------


def repeated(codes_KC: Tensor) -> Tensor:
    """Which codes repeat an earlier one exactly: bool (K,)."""
    _, inverse = torch.unique(codes_KC, dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(codes_KC))
    first.scatter_reduce_(0, inverse, torch.arange(len(codes_KC)), "amin")
    return first[inverse] != torch.arange(len(codes_KC))


def distinct(parts: Sequence[Chunk], tree: Tree, workers: int) -> tuple[Tree, int]:
    """The tree with every repeated code replaced by a vector that is no code yet; and how many were replaced.

    The farthest vectors are taken first. Errors: DataError when there are fewer distinct vectors than codes.
    """
    again_K = repeated(tree.codes)
    missing = int(again_K.sum())
    if not missing:
        return tree, 0
    known = {row.tobytes() for row in tree.codes.numpy()}
    fresh: list[Tensor] = []
    stats = full_pass(parts, tree, workers, sums=False)
    vectors: Iterator[Tensor] = iter(stats.far)
    for source in (vectors, (x for chunk in parts for _, x_NC in chunk.vectors() for x in x_NC)):
        for x_C in source:
            if len(fresh) == missing:
                break
            name = x_C.numpy().tobytes()
            if name not in known:
                known.add(name)
                fresh.append(x_C)
    if len(fresh) < missing:
        num = int((~again_K).sum()) + len(fresh)
        raise DataError(
            f"codebook.size={len(again_K)}, but the features hold only {num} distinct vectors. "
            f"Set codebook.size to at most {num}, or use more images or patches."
        )
    codes_KC = tree.codes.clone()
    codes_KC[again_K] = torch.stack(fresh)
    return place(tree.with_codes(codes_KC), again_K), missing
