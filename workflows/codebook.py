"""Stage `codebook`: two-level k-means over the feature shards, of any size K and number of cells K1.

The cells are k-means of a seeded sample; each vector goes to its nearest cell; a cell gets its part of K (in proportion
to its vectors, or the same as every other), and k-means of its own. `polish` adds Lloyd passes over all vectors, each searched in the nearest cells.
With K1 = 1 it is flat k-means over all vectors. Exactly K distinct codes come out, or a clear error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from smalti import storage
from smalti.artifact import Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import Recipe
from smalti.tokenizers import kmeans
from smalti.tokenizers.metrics import entropy, imbalance, perplexity, usage
from smalti.tracking import Tracker
from smalti.workflows import clustering
from smalti.workflows.clustering import Chunk, PassStats, Tree
from smalti.workflows.code_sizes import sizes_picture
from smalti.workflows.ray_session import ensure_ray
from smalti.workflows.stage import StageRun, find_artifact, run_stage

CENTROIDS = "centroids.safetensors"
TREE = "tree.safetensors"
COUNTS = "counts.safetensors"
PICTURE = "sizes.png"
WORK = "work"
SAMPLE_MIN = 65_536
SAMPLE_A_CELL = 256
SEEDS_A_CODE = 4  # vectors looked at for each seed of flat k-means
FINE_VECTORS = 262_144  # vectors in a task of the second level, unless one cell has more


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The codebook artifact: `centroids.safetensors` (`centroids`, float32 (K, C)) and `tree.safetensors` (`cells`
    (K1, C), `cell_of` int64 (K,)); codes lie in the order of their cells. Beside them `counts.safetensors`, vectors of
    each code (`train` and, where some are held out, `val`, int64 (K,)), and `sizes.png`, their distribution.

    Scores, each for train and val vectors: distortion (mean squared distance), entropy (nats), perplexity, usage,
    imbalance (K·Σp²) and the number of vectors they were counted on. Errors: ConfigError, DataError (too few vectors,
    or distinct ones).
    """
    parents = {"features": find_artifact(recipe, "features")}
    config = recipe.codebook.model_dump(mode="json") | {"seed": recipe.seed}
    return run_stage(recipe, "codebook", "codebook", config, parents, _body(parents["features"]), tracker=tracker)


def check(recipe: Recipe) -> None:
    """ConfigError when there are more cells than codes."""
    section = recipe.codebook
    if section.coarse > section.size and recipe.tokenizer.guidance:
        raise ConfigError(
            f"codebook.coarse={section.coarse} cells for codebook.size={section.size} codes; every cell needs one. "
            "Lower codebook.coarse."
        )


def load_centroids(artifact: Artifact) -> Tensor:
    """The codes of a codebook artifact: float32 (K, C)."""
    return load_tensors(storage.read_bytes(storage.join(artifact.path, CENTROIDS)))["centroids"]


def _body(features: Artifact) -> Any:
    def body(run: StageRun) -> dict[str, int]:
        section = run.recipe.codebook
        check(run.recipe)
        parts = clustering.chunks(features.path, "train")
        num_vectors = sum(rows for chunk in parts for _, rows in chunk.parts)
        if num_vectors < section.size:
            raise DataError(
                f"codebook.size={section.size}, but {features.path} holds only {num_vectors} training vectors. "
                "Set a smaller codebook.size, more features.patches, or use more images."
            )
        workers = max(run.recipe.resources.readers, run.recipe.resources.actors)
        with ensure_ray(run.recipe):
            tree, counts = _Build(run, parts, workers).tree()
            _score(run, features, parts, tree, workers)
        _save(run.path, tree)
        storage.remove(storage.join(run.path, WORK))
        return {"codes": len(tree.codes), "cells": len(tree.cells), "vectors": num_vectors, **counts}

    return body


class _Build:
    """The steps, each kept in `<stage>/work` as soon as it is done: an interrupted run goes on after the last one."""

    def __init__(self, run: StageRun, parts: Sequence[Chunk], workers: int) -> None:
        self.run, self.parts, self.workers = run, parts, workers
        self.section, self.seed = run.recipe.codebook, run.recipe.seed
        self.work = storage.join(run.path, WORK)

    def tree(self) -> tuple[Tree, dict[str, int]]:
        tree = self.flat() if self.section.coarse == 1 else self.two_level()
        for number in range(self.section.polish):
            tree = self.step(f"polish-{number:03d}", tree)
        try:
            tree, replaced = clustering.distinct(self.parts, tree, self.workers)
        except DataError:
            storage.remove(self.work)  # no try with these settings ends otherwise: others may stand here
            raise
        if replaced:
            self.run.log(f"{replaced} codes repeated another one and were put on other vectors")
        if not bool(torch.isfinite(tree.codes).all()):
            raise DataError("k-means gave codes that are NaN or Inf: the features are too large for float32.")
        order = torch.argsort(tree.cell_of, stable=True)
        return Tree(tree.cells, tree.codes[order], tree.cell_of[order]), {"replaced": replaced}

    def flat(self) -> Tree:
        """Lloyd's iterations over all vectors, from seeds drawn from a sample."""
        num, seeds = self.section.size, self.kept("seeds")
        if seeds is None:
            wanted = max(self.section.sample or SAMPLE_MIN, SEEDS_A_CODE * num)
            x_NC = clustering.sample(self.parts, wanted, self.seed, self.workers)
            draw = kmeans.seed_plusplus if num <= kmeans.PLUSPLUS_MAX else kmeans.seed_random
            codes_KC = draw(x_NC, num, torch.Generator().manual_seed(self.seed)).float()
            seeds = Tree(x_NC.mean(0, keepdim=True), codes_KC, torch.zeros(num, dtype=torch.int64))
            self.keep("seeds", seeds)
        tree = seeds
        for number in range(self.section.iterations):
            tree = self.step(f"lloyd-{number:03d}", tree)
        return tree

    def step(self, name: str, tree: Tree) -> Tree:
        """One Lloyd pass over all vectors, unless it was made before."""
        done = self.kept(name)
        if done is not None:
            return done
        moved, stats, reseeded = clustering.lloyd(self.parts, tree, self.workers)
        self.run.log(f"{name}: distortion {stats.distortion:.5g} before it, {reseeded} codes re-seeded")
        self.run.tracker.metrics({"distortion": stats.distortion}, step=int(name.rpartition("-")[2]))
        self.keep(name, moved)
        return moved

    def two_level(self) -> Tree:
        """Cells from a sample, then k-means in each cell."""
        done = self.kept("fine")
        if done is not None:
            return done
        cells_PC = self.cells()
        names = storage.join(self.work, "cells")
        self.run.log(f"sorting the vectors into {len(cells_PC)} cells")
        sizes_P = clustering.write_cells(self.parts, cells_PC, names, self.workers)
        divide = {"proportional": kmeans.allocate, "equal": kmeans.share_equally}[self.section.split]
        shares = divide(self.section.size, sizes_P.tolist())
        codes_KC = self.fine(names, sizes_P.tolist(), shares, cells_PC.shape[1])
        cell_of_K = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
        tree = Tree(cells_PC, codes_KC, cell_of_K)
        self.keep("fine", tree)
        storage.remove(names)
        return tree

    def cells(self) -> Tensor:
        """Centroids of the first level: float32 (K1, C)."""
        done = self.kept("cells")
        if done is not None:
            return done.cells
        num = self.section.coarse
        wanted = self.section.sample or max(SAMPLE_MIN, SAMPLE_A_CELL * num)
        x_NC = clustering.sample(self.parts, max(wanted, num), self.seed, self.workers)
        self.run.log(f"{num} cells from {len(x_NC):,} sampled vectors")
        cells_PC = kmeans.kmeans(x_NC, num, self.section.iterations, torch.Generator().manual_seed(self.seed))
        self.keep("cells", Tree(cells_PC, torch.empty(0, cells_PC.shape[1]), torch.empty(0, dtype=torch.int64)))
        return cells_PC

    def fine(self, folder: str, sizes: list[int], shares: list[int], width: int) -> Tensor:
        """Codes of all cells in order, a task for some neighbouring cells: float32 (K, C)."""
        names = [storage.join(folder, key.replace("/", "-")) for chunk in self.parts for key, _ in chunk.parts]
        items, first = [], 0
        for last in range(1, len(sizes) + 1):
            if last == len(sizes) or sum(sizes[first : last + 1]) > FINE_VECTORS:
                items.append((names, first, shares[first:last], width, self.section.iterations, self.seed))
                first = last
        found = []
        with self.run.progress(sum(shares), "codes") as bar:
            for codes_KC in clustering.in_order(clustering.fine, items, self.workers):
                found.append(codes_KC)
                bar.update(len(codes_KC))
        return torch.cat(found)

    def kept(self, name: str) -> Tree | None:
        path = storage.join(self.work, f"{name}.safetensors")
        if not storage.exists(path):
            return None
        loaded = load_tensors(storage.read_bytes(path))
        return Tree(loaded["cells"], loaded["codes"], loaded["cell_of"])

    def keep(self, name: str, tree: Tree) -> None:
        tensors = {"cells": tree.cells, "codes": tree.codes, "cell_of": tree.cell_of}
        data = save_tensors({key: value.contiguous() for key, value in tensors.items()})
        storage.write_atomic(storage.join(self.work, f"{name}.safetensors"), data)


def _score(run: StageRun, features: Artifact, parts: Sequence[Chunk], tree: Tree, workers: int) -> None:
    """Fill the stage's scores and keep the counts, one pass over all vectors, and one over the held-out ones."""
    counted: dict[str, Tensor] = {}
    for split, members in (("train", parts), ("val", clustering.chunks(features.path, "val"))):
        if not members:
            run.log(f"no {split} vectors: their scores are left out")
            continue
        stats: PassStats = clustering.full_pass(members, tree, workers, sums=False)
        counted[split] = stats.counts
        run.scores |= {
            f"distortion/{split}": stats.distortion,
            f"entropy/{split}": entropy(stats.counts),
            f"perplexity/{split}": perplexity(stats.counts),
            f"usage/{split}": usage(stats.counts),
            f"imbalance/{split}": imbalance(stats.counts),
            f"vectors/{split}": int(stats.counts.sum()),
        }
    storage.write_atomic(storage.join(run.path, COUNTS), save_tensors(counted))
    picture = sizes_picture(counted["train"], "training vectors of a code")
    storage.write_atomic(storage.join(run.path, PICTURE), picture)
    shown = {key: f"{value:.4g}" for key, value in run.scores.items() if not key.startswith(("vectors", "entropy"))}
    run.log(", ".join(f"{key} {value}" for key, value in shown.items()))


def _save(path: str, tree: Tree) -> None:
    centroids = save_tensors({"centroids": tree.codes.contiguous()})
    storage.write_atomic(storage.join(path, TREE), save_tensors({"cells": tree.cells, "cell_of": tree.cell_of}))
    storage.write_atomic(storage.join(path, CENTROIDS), centroids)
