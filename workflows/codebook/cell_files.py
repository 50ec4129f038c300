"""Second level of the codebook: sort vectors by cell, then k-means in each cell.

Axis letters: N vectors, C their width, K codes, P cells. One file per chunk of the features holds
its vectors sorted by cell; a cell's codes are saved as soon as they are computed. If faiss is
installed, it computes the codes of a cell (docs/codebook.md has the figures); one thread computes
each cell, so that its codes are the same on every machine.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from smalti import storage
from smalti.errors import DataError
from smalti.tokenizers import kmeans
from smalti.workflows.codebook import passes
from smalti.workflows.codebook.passes import Chunk
from smalti.workflows.codebook.tasks import in_order

WRITTEN_ROWS = 8_192  # of a cell file, sorted at once


@dataclass(frozen=True)
class CellSettings:
    """Settings of k-means in a cell.

    `width`: numbers per vector. `bound`: of more vectors than this, a sample is used.
    """

    width: int
    iterations: int
    seed: int
    bound: int
    seeding: kmeans.Seeding = "auto"
    spherical: bool = False
    device: str = "cpu"


def cell_file(folder: str, chunk: Chunk) -> str:
    """Path of a chunk's sorted vectors, without suffix.

    `.bin`: float16 rows; `.npy`: the first row of each cell.
    """
    return storage.join(folder, chunk.parts[0][0].replace("/", "-"))


def codes_file(folder: str, cell: int) -> str:
    """Path of the codes of a cell: float32 (share, C)."""
    return storage.join(folder, f"{cell:06d}.npy")


def write_cells(parts: Sequence[Chunk], cells_PC: Tensor, folder: str, workers: int) -> np.ndarray:
    """Write every chunk's vectors sorted by their nearest cell. One pass.

    Existing files are kept.

    Returns:
        The first row of each cell in each file: int32 (files, P + 1).
    """
    import ray

    existing = set(storage.list_names(folder, ".npy"))
    missing = [chunk for chunk in parts if f"{cell_file('', chunk)}.npy" not in existing]
    if missing:
        shared = ray.put(cells_PC)
        for _ in in_order(
            _chunk_cells, [(chunk, shared, folder) for chunk in missing], workers, parts[0].gpus
        ):
            pass
    names = [f"{cell_file(folder, chunk)}.npy" for chunk in parts]
    with ThreadPoolExecutor(passes.READ_THREADS) as threads:
        return np.stack(list(threads.map(lambda name: _load(name).astype(np.int32), names)))


def _chunk_cells(chunk: Chunk, cells_PC: Tensor, folder: str) -> None:
    """Task of `write_cells`."""
    name = cell_file(folder, chunk)
    cells_PC = cells_PC.to(chunk.device)
    rows_NC = np.empty((chunk.rows, chunk.width), np.float16)
    ids_N = torch.empty(chunk.rows, dtype=torch.int64)
    held = 0
    for x_NC in replace(chunk, spherical=False).vectors():
        if chunk.spherical:
            x_NC = x_NC[(x_NC != 0).any(-1)]
        block = slice(held, held + len(x_NC))
        rows_NC[block] = x_NC.half().cpu().numpy()  # exact: they are stored as float16
        ids_N[block] = kmeans.assign(kmeans.on_sphere(x_NC) if chunk.spherical else x_NC, cells_PC)[
            0
        ].cpu()
        held += len(x_NC)
    order = torch.argsort(ids_N[:held], stable=True).numpy()
    counts_P = torch.bincount(ids_N[:held], minlength=len(cells_PC))
    with storage.atomic_file(f"{name}.bin") as temp, open(temp, "wb") as file:
        for first in range(0, held, WRITTEN_ROWS):
            file.write(rows_NC[order[first : first + WRITTEN_ROWS]].data)
    storage.write_atomic(f"{name}.npy", _npy(np.concatenate([[0], np.cumsum(counts_P.numpy())])))


def read_cells(names: Sequence[str], first: int, last: int, settings: CellSettings) -> list[Tensor]:
    """Vectors, float32 (n, C), of the cells first … last − 1, in the order of the files.

    From a larger cell, `settings.bound` vectors are sampled with a seed; only those are held in
    memory.
    """
    starts = [_load(f"{name}.npy")[first : last + 1] for name in names]
    sizes = np.sum([np.diff(one) for one in starts], axis=0)
    drawn = {
        cell: np.sort(_rng(settings.seed, first + cell, 1).permutation(size)[: settings.bound])
        for cell, size in enumerate(sizes)
        if size > settings.bound
    }
    vectors = [
        np.empty((min(size, settings.bound), settings.width), np.float32) for size in sizes.tolist()
    ]
    before = np.zeros(len(sizes), np.int64)
    held = [0] * len(sizes)
    for name, own in zip(names, starts, strict=True):
        rows = read_rows(name, int(own[0]), int(own[-1]), settings.width)
        for cell, (low, high) in enumerate(zip(own[:-1] - own[0], own[1:] - own[0], strict=True)):
            piece = rows[low:high]
            at = before[cell]
            if cell in drawn:
                inside = drawn[cell][
                    np.searchsorted(drawn[cell], at) : np.searchsorted(drawn[cell], at + high - low)
                ]
                piece = piece[inside - at]
            vectors[cell][held[cell] : held[cell] + len(piece)] = piece
            before[cell] += high - low
            held[cell] += len(piece)
    return [torch.from_numpy(x_NC) for x_NC in vectors]


def read_rows(name: str, low: int, high: int, width: int) -> np.ndarray:
    """Rows low … high − 1 of a cell file, float16, by one range read.

    Raises:
        DataError: if the file is truncated.
    """
    rows = np.frombuffer(
        storage.read_range(f"{name}.bin", low * width * 2, (high - low) * width * 2), np.float16
    )
    if len(rows) != (high - low) * width:
        raise DataError(
            f"{name}.bin is shorter than its index says. Remove its folder and run the stage again."
        )
    return rows.reshape(-1, width)


def fine(
    names: Sequence[str], folder: str, first: int, shares: Sequence[int], settings: CellSettings
) -> int:
    """Task: compute the codes of some cells, one file per cell in `folder`.

    Cell first + i gets `shares[i]` codes. Existing files are kept. Returns the number of codes.
    """
    missing = [
        i
        for i, num in enumerate(shares)
        if num and not storage.exists(codes_file(folder, first + i))
    ]
    if missing:
        low, high = first + missing[0], first + missing[-1] + 1
        vectors = read_cells(names, low, high, settings)
        for i in missing:
            x_NC = vectors[first + i - low]
            vectors[first + i - low] = torch.empty(0)
            codes_KC = cell_codes(x_NC, shares[i], first + i, settings)
            storage.write_atomic(codes_file(folder, first + i), _npy(codes_KC.numpy()))
    return sum(shares)


def cell_codes(x_NC: Tensor, num: int, cell: int, settings: CellSettings) -> Tensor:
    """k-means of a cell's vectors: float32 (num, C).

    By faiss if it is installed, no GPU is requested and there is more than one iteration. The
    vectors may be overwritten.
    """
    faiss = _faiss()
    if faiss is None or settings.device != "cpu" or len(x_NC) <= num or settings.iterations == 1:
        x_NC = x_NC.to(settings.device)
        generator = torch.Generator().manual_seed(int(_rng(settings.seed, cell).integers(2**63)))
        how = (settings.iterations, generator, settings.spherical, settings.seeding)
        return kmeans.kmeans(x_NC, num, *how).cpu()
    if settings.spherical:
        x_NC = kmeans.on_sphere(x_NC)
    plusplus = kmeans.by_plusplus(settings.seeding, num)
    machine = faiss.Kmeans(
        x_NC.shape[1],
        num,
        niter=settings.iterations - 1,
        seed=int(_rng(settings.seed, cell).integers(1, 2**31)),
        spherical=settings.spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x_NC),
        init_method=getattr(
            faiss, f"ClusteringInitMethod_{'KMEANS_PLUS_PLUS' if plusplus else 'RANDOM'}"
        ),
    )
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        machine.train(x_NC.numpy())
    finally:
        faiss.omp_set_num_threads(threads)
    return _last_step(x_NC, torch.from_numpy(machine.centroids.copy()), settings.spherical)


def _last_step(x_NC: Tensor, c_KC: Tensor, spherical: bool) -> Tensor:
    """The last Lloyd iteration, with float64 means.

    faiss places an empty code close to another one. Here it is moved to a far vector; if there is
    none, it becomes an exact copy of a code, which is detected later.
    """
    ids_N, distance_N = kmeans.assign(x_NC, c_KC)
    sums_KC, counts_K = kmeans.lloyd_stats(x_NC, ids_N, len(c_KC))
    c_KC = kmeans.move(c_KC, sums_KC, counts_K, spherical)
    c_KC[counts_K == 0] = c_KC[counts_K.argmax()].clone()
    return kmeans.reseed_empty(c_KC, counts_K, x_NC, distance_N)[0]


def _faiss() -> ModuleType | None:
    """faiss, if it is installed and can seed by k-means++."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss if hasattr(faiss, "ClusteringInitMethod_KMEANS_PLUS_PLUS") else None


def _rng(seed: int, cell: int, use: int = 0) -> np.random.Generator:
    return np.random.default_rng([abs(seed), cell, use])


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def load_codes(folder: str, shares: Sequence[int], width: int) -> Tensor:
    """The codes of all cells in order: float32 (sum, C)."""
    codes_KC = torch.empty(sum(shares), width)
    start = 0
    for cell, num in enumerate(shares):
        if num:
            codes_KC[start : start + num] = torch.from_numpy(_load(codes_file(folder, cell)))
            start += num
    return codes_KC


def _load(path: str) -> np.ndarray:
    found: np.ndarray = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    return found
