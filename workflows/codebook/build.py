"""The steps of stage `codebook`, each saved when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from smalti import storage
from smalti.errors import ConfigError, DataError
from smalti.schema import CodebookSection
from smalti.tokenizers import kmeans, tensor_files
from smalti.workflows.codebook import cell_files, cell_ranges, passes, recall
from smalti.workflows.codebook import duplicates as distinct
from smalti.workflows.codebook.passes import Chunk, Vectors
from smalti.workflows.codebook.tree import Tree
from smalti.workflows.pipeline.stage import StageRun

SAMPLED = "sampled_cells.json"
DISTINCT = "distinct.json"
SAMPLE_MIN = 65_536
SAMPLE_A_CELL = 256
SEEDS_A_CODE = 4  # sampled vectors per seed of flat k-means
FINE_VECTORS = 262_144  # vectors in a task of the second level, unless one cell has more
Saved = TypeVar("Saved")


def check_reach(section: CodebookSection, drawn: int) -> None:
    """Raise ConfigError if the cells' k-means see fewer vectors than codes."""
    if drawn < section.size:
        raise ConfigError(
            f"codebook.size={section.size:,}, but with "
            f"codebook.cell_vectors={section.cell_vectors:,} the k-means of all cells together see "
            f"{drawn:,} vectors at most. Set a larger codebook.cell_vectors, or a smaller "
            "codebook.size."
        )


class CodebookBuild:
    """The steps of the stage.

    Each is saved in `<stage>/work` when it is finished; an interrupted run resumes after the last
    one.
    """

    def __init__(self, run: StageRun, parts: Sequence[Chunk], workers: int) -> None:
        self.run = run
        self.parts = parts
        self.workers = workers
        self.section = run.recipe.codebook
        self.seed = run.recipe.seed
        self.work = recall.work(run)
        self.cell_files = storage.join(self.work, "cells")

    def tree(self) -> tuple[Tree, dict[str, int]]:
        if self.section.coarse == 1:
            tree = self.iterate("lloyd", lambda: self.parts, self.seeds, self.section.iterations)
        else:
            tree = self.iterate("polish", self.cell_chunks, self.two_level, self.section.polish)
        storage.remove(self.cell_files)
        counts = {"replaced": 0, "dropped": 0, "sampled_cells": self.noted(SAMPLED, 0)}
        tree, changed = self.usable(tree)
        return tree.in_cell_order(), counts | changed

    def usable(self, tree: Tree) -> tuple[Tree, dict[str, int]]:
        """Replace or drop codes that repeat another or are not finite; saves the result."""
        done = self.kept("distinct")
        if done is not None:
            return done, self.noted(DISTINCT, {})
        bad_K = distinct.unusable(tree.codes)
        num = int(bad_K.sum())
        if not num:
            return tree, {}
        if self.section.duplicates == "drop":
            tree = distinct.without(tree, bad_K)
            counts = {"dropped": num}
            what = "were dropped"
        else:
            counts = {"replaced": num}
            what = "were replaced by other vectors"
            try:
                tree = distinct.replaced(self.parts, tree, bad_K, self.workers)
            except DataError:
                storage.remove(self.work)  # every run with these settings fails: free the folder
                raise
        self.run.log(
            f"{num} codes repeated another one or were not finite and {what}: there are "
            f"{len(tree.codes)}"
        )
        storage.write_json(storage.join(self.work, DISTINCT), counts)
        self.keep("distinct", tree)
        return tree, counts

    def seeds(self) -> Tree:
        """Start of flat k-means over all vectors."""
        wanted = max(self.section.sample or SAMPLE_MIN, SEEDS_A_CODE * self.section.size)
        return self.seeds_of(self.sampled(wanted), self.section.size)

    def sampled(self, wanted: int) -> list[Chunk]:
        return passes.sample(
            self.parts, wanted, self.seed, self.workers, storage.join(self.work, "sample")
        )

    def seeds_of(self, sample: Sequence[Chunk], num: int) -> Tree:
        """`num` codes seeded from a sample, in one cell; saves them."""
        done = self.kept("seeds")
        if done is not None:
            return done
        x_NC = torch.empty(sum(chunk.rows for chunk in sample), self.parts[0].width)
        held = 0
        for chunk in sample:
            for block_NC in chunk.on_cpu().vectors():
                x_NC[held : held + len(block_NC)] = block_NC
                held += len(block_NC)
        x_NC = x_NC[:held]
        if not held:
            storage.remove(self.work)
            raise DataError(
                "All sampled vectors are 0, and codebook.spherical=true needs directions. Set it "
                "to false."
            )
        codes_KC = kmeans.seed(
            x_NC, num, torch.Generator().manual_seed(self.seed), self.section.seeding
        ).float()
        seeds = Tree(x_NC.mean(0, keepdim=True), codes_KC, torch.zeros(num, dtype=torch.int64))
        self.keep("seeds", seeds)
        return seeds

    def iterate(
        self,
        name: str,
        parts: Callable[[], Sequence[Vectors]],
        first: Callable[[], Tree],
        steps: int,
    ) -> Tree:
        """Lloyd passes over the parts, from `first()` or from the last saved pass."""
        last = max(
            (n for n in range(steps) if storage.exists(self.file(f"{name}-{n:03d}"))), default=-1
        )
        tree = first() if last < 0 else self.kept(f"{name}-{last:03d}")
        assert tree is not None
        data = parts() if last + 1 < steps else ()
        for number in range(last + 1, steps):
            tree, stats, reseeded = passes.lloyd(data, tree, self.workers)
            step = f"{name}-{number:03d}"
            self.run.log(
                f"{step}: distortion {stats.distortion:.5g} before it, {reseeded} codes re-seeded"
            )
            metric = "distortion_of_cells" if name == "coarse" else "distortion"
            self.run.tracker.metrics({metric: stats.distortion}, step=number)
            self.keep(step, tree)
            storage.remove(self.file(f"{name}-{number - 1:03d}"))
        return tree

    def two_level(self) -> Tree:
        """Cells from a sample, then k-means in each cell."""
        done = self.kept("fine")
        if done is not None:
            return done
        cells_PC = self.cells()
        codes = storage.join(self.work, "codes")
        self.run.log(f"sorting the vectors into {len(cells_PC)} cells")
        starts_FP = cell_files.write_cells(self.parts, cells_PC, self.cell_files, self.workers)
        sizes = np.diff(starts_FP.sum(0, dtype=np.int64)).tolist()
        shares = self.shares(sizes)
        self.fine(codes, sizes, shares)
        codes_KC = cell_files.load_codes(codes, shares, cells_PC.shape[1])
        cell_of_K = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
        tree = Tree(cells_PC, codes_KC, cell_of_K)
        sampled = sum(size > self.section.cell_vectors for size in sizes)
        storage.write_json(storage.join(self.work, SAMPLED), sampled)
        self.keep("fine", tree)
        storage.remove(codes)
        return tree

    def shares(self, sizes: list[int]) -> list[int]:
        """Codes per cell: at most the vectors that its k-means sees."""
        bound = self.section.cell_vectors
        most = [min(size, bound) for size in sizes]
        sampled = sum(size > bound for size in sizes)
        if sampled:
            self.run.log(
                f"{sampled} cells hold more than codebook.cell_vectors={bound:,} vectors: their "
                "codes are computed from a sample of that size"
            )
            try:
                check_reach(self.section, sum(most))
            except ConfigError:
                storage.remove(self.work)  # every run with these settings fails: free the folder
                raise
        divide = {"proportional": kmeans.allocate, "equal": kmeans.share_equally}[
            self.section.split
        ]
        return divide(self.section.size, sizes, most)

    def cell_chunks(self) -> list[cell_ranges.CellChunk]:
        """All vectors by their cells; missing files are written."""
        starts_FP = cell_files.write_cells(self.parts, self.cells(), self.cell_files, self.workers)
        return cell_ranges.cell_chunks(self.parts, starts_FP, self.cell_files)

    def noted(self, name: str, default: Saved) -> Saved:
        path = storage.join(self.work, name)
        return storage.read_json(path) if storage.exists(path) else default

    def cells(self) -> Tensor:
        """Centroids of the first level, by Lloyd over a sample: float32 (K1, C)."""
        done = self.kept("cells")
        if done is not None:
            return done.cells
        num = self.section.coarse
        sample = self.sampled(max(self.section.sample or max(SAMPLE_MIN, SAMPLE_A_CELL * num), num))
        self.run.log(f"{num} cells from {sum(chunk.rows for chunk in sample):,} sampled vectors")
        cells_PC = self.iterate(
            "coarse", lambda: sample, lambda: self.seeds_of(sample, num), self.section.iterations
        ).codes
        self.keep(
            "cells",
            Tree(cells_PC, torch.empty(0, cells_PC.shape[1]), torch.empty(0, dtype=torch.int64)),
        )
        storage.remove(storage.join(self.work, "sample"))
        return cells_PC

    def fine(self, codes: str, sizes: list[int], shares: list[int]) -> None:
        """Compute the codes of all cells; each task takes some neighbouring cells."""
        names = [cell_files.cell_file(self.cell_files, chunk) for chunk in self.parts]
        section = self.section
        chunk = self.parts[0]
        how = (section.seeding, section.spherical, chunk.device)
        settings = cell_files.CellSettings(
            chunk.width, section.iterations, self.seed, section.cell_vectors, *how
        )
        runs = cell_ranges.runs(sizes, FINE_VECTORS)
        items = [(names, codes, first, shares[first:last], settings) for first, last in runs]
        with self.run.progress(sum(shares), "codes") as bar:
            for made in passes.in_order(cell_files.fine, items, self.workers, chunk.gpus):
                bar.update(made)

    def file(self, name: str) -> str:
        return storage.join(self.work, f"{name}.safetensors")

    def kept(self, name: str) -> Tree | None:
        if not storage.exists(self.file(name)):
            return None
        loaded = tensor_files.read(self.file(name))
        return Tree(loaded["cells"], loaded["codes"], loaded["cell_of"])

    def keep(self, name: str, tree: Tree) -> None:
        tensor_files.write(
            self.file(name), {"cells": tree.cells, "codes": tree.codes, "cell_of": tree.cell_of}
        )
