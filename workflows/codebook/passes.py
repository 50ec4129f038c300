"""Passes of k-means over feature shards, on Ray.

Axis letters: N vectors, C their width, K codes, P cells of the first level. The vectors are cut
into chunks (whole shards) by their number alone; each chunk is a task. Sums are added in the order
of the chunks (see `partial_sums`), so that the result does not depend on how many tasks run at
once. The driver holds the codes and one range of sums, a task the sums of the codes in its chunk.
Passes over the data dominate the cost: each function states its number of passes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from smalti import shards
from smalti.errors import DataError
from smalti.tokenizers import kmeans
from smalti.tokenizers.code_index import CodeIndex, Probes
from smalti.workflows.codebook.partial_sums import RangeSums, UsedSums
from smalti.workflows.codebook.tasks import in_order
from smalti.workflows.codebook.tree import SharedTree, Tree, placed

CHUNK_VECTORS = 262_144  # per task: lost if the task is
SAMPLE_CHUNK_VECTORS = 16_384  # per task of the first level, whose sample is small
BLOCK_VECTORS = 65_536  # in float32 at once
PROBES = 4  # cells searched per vector while codes still move
POLISH = Probes(PROBES, 1.0, math.nan)
FAR_A_CHUNK = 256  # candidates for codes without a vector
FAR_KEPT = 16_384  # of all chunks
READ_THREADS = 16
ChunkResult = tuple[Tensor, float, Tensor, Tensor]
"""Counts, sum of distances, far vectors and their distances."""


class Vectors(Protocol):
    """The data of a task: a chunk, or a piece of the sorted vectors (`cell_ranges`)."""

    @property
    def rows(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def gpus(self) -> float: ...
    @property
    def spherical(self) -> bool: ...
    def vectors(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Chunk:
    """Some whole shards of a features artifact: (key, rows) each.

    A task requests `gpus` and has its vectors on `device`. With `spherical` they are normalized,
    and those of norm 0 are left out.
    """

    path: str
    parts: tuple[tuple[str, int], ...]
    width: int = 0
    spherical: bool = False
    gpus: float = 0.0
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return sum(count for _, count in self.parts)

    def on_cpu(self) -> Chunk:
        """The same chunk for a process without a GPU, such as the driver."""
        return replace(self, gpus=0.0, device="cpu")

    def vectors(self) -> Iterator[Tensor]:
        """Yield float32 blocks (`BLOCK_VECTORS`, C); the last may be smaller.

        Raises:
            DataError: if a vector holds NaN or Inf.
        """
        for x_NC in in_blocks(
            (self._shard(key, rows) for key, rows in self.parts), self.rows, self.width
        ):
            # one sum is enough: float16 values cannot overflow it
            if not bool(torch.isfinite(x_NC.sum())):
                raise DataError(
                    f"{self._not_finite()} holds NaN or Inf. Remove the features and compute them "
                    "again."
                )
            yield kmeans.on_sphere(x_NC.to(self.device)) if self.spherical else x_NC.to(self.device)

    def _shard(self, key: str, rows: int) -> np.ndarray:
        x_NC = shards.vectors(shards.read_shard(self.path, key, ["vector"]))
        if len(x_NC) != rows:
            raise DataError(
                f"{shards.shard_path(self.path, key)} holds {len(x_NC)} vectors, where it held "
                f"{rows} when this run began. Let no other process write there, then run the same "
                "command again."
            )
        return x_NC

    def _not_finite(self) -> str:
        """Path of the first shard that holds NaN or Inf."""
        bad = (key for key, rows in self.parts if not np.isfinite(self._shard(key, rows)).all())
        return shards.shard_path(self.path, next(bad))


def in_blocks(arrays: Iterable[np.ndarray], rows: int, width: int) -> Iterator[Tensor]:
    """Regroup arrays (n, C) of `rows` rows in total into float32 (`BLOCK_VECTORS`, C).

    The last block may be smaller.
    """
    held = 0
    left = rows
    block_NC = np.empty((min(left, BLOCK_VECTORS), width), np.float32)
    for array in arrays:
        start = 0
        while start < len(array):
            part = array[start : start + len(block_NC) - held]
            block_NC[held : held + len(part)] = part
            start += len(part)
            held += len(part)
            if held == len(block_NC):
                left -= held
                yield torch.from_numpy(block_NC)
                held = 0
                block_NC = np.empty((min(left, BLOCK_VECTORS), width), np.float32)


@dataclass
class PassStats:
    """Result of a pass.

    `far`: the vectors with the largest distances, farthest first.
    """

    counts: Tensor
    distance_sum: float = 0.0
    far: Tensor = field(default_factory=lambda: torch.empty(0))
    far_distance: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def distortion(self) -> float:
        """Mean squared distance between a vector and its code."""
        return self.distance_sum / max(1, int(self.counts.sum()))

    def add(self, counts_K: Tensor, distance: float, far_NC: Tensor, far_N: Tensor) -> None:
        """Add the result of a chunk; at equal distance the earlier vectors come first."""
        self.counts += counts_K
        self.distance_sum += distance
        distances = torch.cat([self.far_distance, far_N])
        order = torch.argsort(distances, descending=True, stable=True)[:FAR_KEPT]
        self.far = (torch.cat([self.far, far_NC]) if len(self.far) else far_NC)[order]
        self.far_distance = distances[order]


def chunks(path: str, split: str, target: int | None = None) -> list[Chunk]:
    """The shards of a split in chunks of about `target` vectors, in order.

    Only footers are read; empty shards are left out.

    Args:
        target: default `CHUNK_VECTORS`.

    Raises:
        DataError: if the vectors of a shard have another width than those of most shards.
    """
    keys = shards.list_shards(path, split)
    with ThreadPoolExecutor(READ_THREADS) as threads:
        shapes = list(threads.map(lambda key: shards.vector_shape(path, key), keys))
    width = (
        Counter(own for rows, own in shapes if rows).most_common(1)[0][0]
        if any(r for r, _ in shapes)
        else 0
    )
    found: list[list[tuple[str, int]]] = [[]]
    for key, (rows, own) in zip(keys, shapes, strict=True):
        if not rows:
            continue
        if own != width:
            raise DataError(
                f"{shards.shard_path(path, key)} holds vectors of {own} numbers, where the other "
                f"shards of {path} hold {width}. Remove {path} and compute the features again with "
                "one encoder."
            )
        if sum(count for _, count in found[-1]) + rows > (target or CHUNK_VECTORS) and found[-1]:
            found.append([])
        found[-1].append((key, rows))
    return [Chunk(path, tuple(parts), width) for parts in found if parts]


def full_pass(
    parts: Sequence[Vectors],
    tree: Tree,
    workers: int,
    *,
    sums: RangeSums | None = None,
    probes: Probes = POLISH,
) -> PassStats:
    """Assign every vector by a search of the tree. One pass.

    Args:
        sums: if given, receives the sums of the vectors of each code.

    Returns:
        Counts, distances and the farthest vectors.
    """
    shared = tree.shared()
    total = PassStats(torch.zeros(len(tree.codes), dtype=torch.int64))
    gpus = parts[0].gpus if parts else 0
    if sums is None:
        for found in in_order(
            _chunk_pass, [(chunk, shared, probes) for chunk in parts], workers, gpus
        ):
            total.add(*found)
        return total
    items = [(chunk, shared, probes, sums.bounds) for chunk in parts]
    for (found, used), *references in in_order(_chunk_sums, items, workers, gpus, len(sums.bounds)):
        sums.add(references, used)
        total.add(*found)
    return total


def _chunk_pass(chunk: Vectors, shared: SharedTree, probes: Probes) -> ChunkResult:
    """Task of `full_pass`."""
    tree = Tree.of_shared(shared, chunk.device)
    with torch.device(chunk.device):
        return _chunk_stats(chunk, tree, probes, None)


def _chunk_sums(
    chunk: Vectors,
    shared: SharedTree,
    probes: Probes,
    bounds: Sequence[tuple[int, int]],
) -> Iterator[object]:
    """Task of `full_pass`: the result of `_chunk_pass` and the codes per range.

    Then each range's part is yielded.
    """
    tree = Tree.of_shared(shared, chunk.device)
    with torch.device(chunk.device):
        sums = UsedSums(len(tree.codes), tree.codes.shape[1], chunk.rows)
        found = _chunk_stats(chunk, tree, probes, sums)
        yield found, [sums.num_used(low, high) for low, high in bounds]
    for low, high in bounds:
        yield sums.part(low, high)


def _chunk_stats(chunk: Vectors, tree: Tree, probes: Probes, sums: UsedSums | None) -> ChunkResult:
    num, width = tree.codes.shape
    index = CodeIndex(tree.codes, tree.cells, tree.cell_of)
    counts_K = torch.zeros(num, dtype=torch.int64)
    distance_sum = 0.0
    far_NC = torch.empty(0, width)
    far_N = torch.empty(0)
    for x_NC in chunk.vectors():
        ids_N, distance_N = index.tree(x_NC, probes.cells, probes.reach)
        if sums is not None:
            sums.add(x_NC, ids_N)
        counts_K += torch.bincount(ids_N, minlength=num)
        distance_sum += float(distance_N.double().sum())
        top = torch.argsort(distance_N, descending=True, stable=True)[:FAR_A_CHUNK]
        far_N, far_NC = torch.cat([far_N, distance_N[top]]), torch.cat([far_NC, x_NC[top]])
        top = torch.argsort(far_N, descending=True, stable=True)[:FAR_A_CHUNK]
        far_N, far_NC = far_N[top], far_NC[top]
    return counts_K.cpu(), distance_sum, far_NC.cpu(), far_N.cpu()


def lloyd(parts: Sequence[Vectors], tree: Tree, workers: int) -> tuple[Tree, PassStats, int]:
    """One Lloyd iteration over all vectors. One pass.

    Codes without a vector are moved to the vectors farthest from theirs. The tree's codes are
    overwritten: there is never a second matrix of K codes.

    Returns:
        The tree with moved codes, the statistics before the move, and the number of re-seeded
        codes.
    """
    sums = RangeSums(*tree.codes.shape)
    stats = full_pass(parts, tree, workers, sums=sums)
    spherical = any(chunk.spherical for chunk in parts)
    for codes, sums_KC in sums.ranges():
        tree.codes[codes] = kmeans.move(tree.codes[codes], sums_KC, stats.counts[codes], spherical)
    places, rows = kmeans.fresh_for_empty(stats.counts, stats.far, stats.far_distance)
    tree.codes[places] = rows
    return placed(tree), stats, len(places)


def sample(parts: Sequence[Chunk], num: int, seed: int, workers: int, folder: str) -> list[Chunk]:
    """Write a seeded sample of about `num` vectors to `folder`. One pass.

    One shard per chunk, in proportion to its size; existing shards are kept.

    Returns:
        The sample in chunks.
    """
    rows = [chunk.rows for chunk in parts]
    kind = parts[0]
    total = sum(rows)
    existing = set(shards.list_shards(folder, "train"))
    quotas = rows if num >= total else kmeans.allocate(max(num, len(rows)), rows)
    items = [
        (chunk, quota, seed, shards.shard_key("train", number), folder)
        for number, (chunk, quota) in enumerate(zip(parts, quotas, strict=True))
    ]
    missing = [item for item in items if item[3] not in existing]
    for _ in in_order(_chunk_sample, missing, workers) if missing else ():
        pass
    made = chunks(folder, "train", SAMPLE_CHUNK_VECTORS)
    return [replace(kind, path=folder, parts=chunk.parts) for chunk in made]


def _chunk_sample(chunk: Chunk, quota: int, seed: int, key: str, folder: str) -> None:
    """Task of `sample`."""
    number = int(key.rpartition("/")[2])
    chosen = np.sort(np.random.default_rng([abs(seed), number]).permutation(chunk.rows)[:quota])
    taken = []
    start = 0
    for x_NC in replace(chunk.on_cpu(), spherical=False).vectors():
        mine = chosen[(chosen >= start) & (chosen < start + len(x_NC))] - start
        drawn = x_NC.numpy()[mine].astype(np.float16)  # exact: they are stored as float16
        taken.append(drawn[(drawn != 0).any(1)] if chunk.spherical else drawn)
        start += len(x_NC)
    vectors = shards.list_column(np.concatenate(taken))
    schema = pa.schema([shards.feature_schema(chunk.width).field("vector")])
    shards.write_shard(folder, key, pa.table([vectors], schema))
