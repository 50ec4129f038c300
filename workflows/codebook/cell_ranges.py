"""Vectors of neighbouring cells together, for the polish passes.

The vectors of a cell are near the codes of few cells, so that the sums of a piece are far smaller
than those of a chunk. A piece takes one range read per file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from smalti.tokenizers import kmeans
from smalti.workflows.codebook import cell_files, passes
from smalti.workflows.codebook.passes import Chunk


@dataclass(frozen=True)
class CellChunk:
    """Ranges of cell files, (name, first row, end) each; see `passes.Vectors`."""

    spans: tuple[tuple[str, int, int], ...]
    width: int
    spherical: bool = False
    gpus: float = 0.0
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return sum(end - first for _, first, end in self.spans)

    def vectors(self) -> Iterator[Tensor]:
        """Yield float32 blocks (n, C), file by file.

        Raises:
            DataError: if a file is truncated.
        """
        with ThreadPoolExecutor(
            passes.READ_THREADS
        ) as threads:  # many small reads: object stores have high latency
            arrays = threads.map(self._read, self.spans)
            for x_NC in passes.in_blocks(arrays, self.rows, self.width):
                yield (
                    kmeans.on_sphere(x_NC.to(self.device))
                    if self.spherical
                    else x_NC.to(self.device)
                )

    def _read(self, span: tuple[str, int, int]) -> np.ndarray:
        name, first, end = span
        return cell_files.read_rows(name, first, end, self.width)


def cell_chunks(parts: Sequence[Chunk], starts_FP: np.ndarray, folder: str) -> list[CellChunk]:
    """All vectors in the cell files, in pieces about as large as a chunk.

    A larger cell is cut into several pieces, of some files each. See `cell_files.write_cells`.
    """
    kind = parts[0]
    most = passes.CHUNK_VECTORS
    names = [cell_files.cell_file(folder, chunk) for chunk in parts]
    found: list[CellChunk] = []
    for first, last in runs(np.diff(starts_FP.sum(0, dtype=np.int64)).tolist(), most):
        spans = list(
            zip(names, starts_FP[:, first].tolist(), starts_FP[:, last].tolist(), strict=True)
        )
        for low, high in runs([end - start for _, start, end in spans], most):
            kept = tuple(span for span in spans[low:high] if span[2] > span[1])
            if kept:
                found.append(CellChunk(kept, kind.width, kind.spherical, kind.gpus, kind.device))
    return found


def runs(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Cut a list into runs of total size at most `most`, or of one item.

    Returns:
        (first, end) of each run.
    """
    found = []
    first = 0
    held = 0
    for place, size in enumerate(sizes):
        if place > first and held + size > most:
            found.append((first, place))
            first = place
            held = 0
        held += size
    return [*found, (first, len(sizes))] if len(sizes) else found
