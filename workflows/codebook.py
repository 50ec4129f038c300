"""Stage `codebook`: two-level k-means over the feature shards, of any size K and number of cells K1.

The cells are k-means of a seeded sample; each vector goes to its nearest cell; a cell gets its part of K (in proportion
to its vectors, or the same as every other), and k-means of its own. `polish` adds Lloyd passes over all vectors, each searched in the nearest cells.
With K1 = 1 it is flat k-means over all vectors. Exactly K distinct codes come out, or a clear error; with
`codebook.duplicates: drop`, as many as are distinct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from smalti.tokenizers.code_index import Probes
from smalti.tokenizers.metrics import entropy, imbalance, perplexity, usage
from smalti.tracking import Tracker
from smalti.workflows import cells, clustering, distinct, recall
from smalti.workflows.clustering import Chunk, PassStats, Tree
from smalti.workflows.code_sizes import sizes_picture
from smalti.workflows.ray_session import ensure_ray
from smalti.workflows.stage import StageRun, find_artifact, run_stage

CENTROIDS = "centroids.safetensors"
TREE = "tree.safetensors"
COUNTS = "counts.safetensors"
PICTURE = "sizes.png"
WORK = "work"
SAMPLED = "sampled_cells.json"
SAMPLE_MIN = 65_536
SAMPLE_A_CELL = 256
SEEDS_A_CODE = 4  # vectors looked at for each seed of flat k-means
FINE_VECTORS = 262_144  # vectors in a task of the second level, unless one cell has more


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The codebook artifact: `centroids.safetensors` (`centroids`, float32 (K, C)) and `tree.safetensors` (`cells`
    (K1, C), `cell_of` int64 (K,), and `searched_cells` and `reach` for `CodeIndex.tree`, with which `recall` is the share
    of held-out vectors that find their nearest code); codes lie in the order of their cells. Beside them
    `counts.safetensors`, vectors of each code (`train` and, where some are held out, `val`, int64 (K,)), and `sizes.png`.

    Scores: `recall`, and each for train and val vectors distortion (mean squared distance), entropy (nats), perplexity,
    usage, imbalance (K·Σp²) and the number of vectors they were counted on. Errors: ConfigError, DataError (too few
    vectors, or distinct ones).
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
        parts, held_out = _chunks(run.recipe, features.path)
        num_vectors = sum(chunk.rows for chunk in parts)
        if num_vectors < section.size:
            raise DataError(
                f"codebook.size={section.size}, but {features.path} holds only {num_vectors} training vectors. "
                "Set a smaller codebook.size, more features.patches, or use more images."
            )
        workers = max(run.recipe.resources.readers, run.recipe.resources.actors)
        with ensure_ray(run.recipe):
            tree, counts = _Build(run, parts, workers).tree()
            probes = _probes(run, held_out or parts, tree, workers)
            _score(run, {"train": parts, "val": held_out}, tree, workers, probes)
        _save(run.path, tree, probes)
        storage.remove(storage.join(run.path, WORK))
        return {
            "codes": len(tree.codes),
            "cells": len(tree.cells),
            "searched_cells": probes.cells,
            "vectors": num_vectors,
            **counts,
        }

    return body


def _chunks(recipe: Recipe, path: str) -> tuple[list[Chunk], list[Chunk]]:
    """Chunks of the train and val vectors. Errors: DataError, shards of different widths."""
    spherical, gpus = recipe.codebook.spherical, recipe.resources.gpus_per_worker
    parts, held_out = (clustering.chunks(path, split, spherical=spherical, gpus=gpus) for split in ("train", "val"))
    if parts and held_out and parts[0].width != held_out[0].width:
        raise DataError(
            f"{path}: train vectors have {parts[0].width} numbers, val vectors {held_out[0].width}. "
            f"Remove {path} and make the features again with one encoder."
        )
    return parts, held_out


class _Build:
    """The steps, each kept in `<stage>/work` as soon as it is done: an interrupted run goes on after the last one."""

    def __init__(self, run: StageRun, parts: Sequence[Chunk], workers: int) -> None:
        self.run, self.parts, self.workers = run, parts, workers
        self.section, self.seed = run.recipe.codebook, run.recipe.seed
        self.work = storage.join(run.path, WORK)

    def tree(self) -> tuple[Tree, dict[str, int]]:
        if self.section.coarse == 1:
            tree = self.iterate("lloyd", self.parts, self.seeds, self.section.iterations)
        else:
            tree = self.iterate("polish", self.parts, self.two_level, self.section.polish)
        counts = {"replaced": 0, "dropped": 0, "sampled_cells": self.noted_sampled()}
        bad_K = distinct.unusable(tree.codes)
        if bool(bad_K.any()):
            tree, counts = self.mended(tree, bad_K, counts)
        return tree.in_cell_order(), counts

    def mended(self, tree: Tree, bad_K: Tensor, counts: dict[str, int]) -> tuple[Tree, dict[str, int]]:
        """Codes that repeat another one or are not finite put on other vectors or dropped, as the recipe says."""
        num = int(bad_K.sum())
        what = f"{num} codes repeated another one or were not finite"
        if self.section.duplicates == "drop":
            tree = distinct.without(tree, bad_K)
            self.run.log(f"{what} and were dropped: {len(tree.codes)} are left")
            return tree, counts | {"dropped": num}
        try:
            tree = distinct.replaced(self.parts, tree, bad_K, self.workers)
        except DataError:
            storage.remove(self.work)  # no try with these settings ends otherwise: others may stand here
            raise
        self.run.log(f"{what} and were put on other vectors")
        return tree, counts | {"replaced": num}

    def seeds(self) -> Tree:
        """Where flat k-means over all vectors starts."""
        wanted = max(self.section.sample or SAMPLE_MIN, SEEDS_A_CODE * self.section.size)
        return self.seeds_of(self.sampled(wanted), self.section.size)

    def sampled(self, wanted: int) -> list[Chunk]:
        return clustering.sample(self.parts, wanted, self.seed, self.workers, storage.join(self.work, "sample"))

    def seeds_of(self, sample: Sequence[Chunk], num: int) -> Tree:
        """`num` codes drawn from a sample, in one cell; kept."""
        done = self.kept("seeds")
        if done is not None:
            return done
        x_NC = torch.cat([x_NC for chunk in sample for _, x_NC in chunk.on_cpu().vectors()])
        codes_KC = kmeans.seed(x_NC, num, torch.Generator().manual_seed(self.seed), self.section.seeding).float()
        seeds = Tree(x_NC.mean(0, keepdim=True), codes_KC, torch.zeros(num, dtype=torch.int64))
        self.keep("seeds", seeds)
        return seeds

    def iterate(self, name: str, parts: Sequence[Chunk], first: Callable[[], Tree], steps: int) -> Tree:
        """Lloyd passes over the parts, from `first()` or from the last pass that was kept."""
        last = max((n for n in range(steps) if storage.exists(self.file(f"{name}-{n:03d}"))), default=-1)
        tree = first() if last < 0 else self.kept(f"{name}-{last:03d}")
        assert tree is not None
        for number in range(last + 1, steps):
            tree, stats, reseeded = clustering.lloyd(parts, tree, self.workers)
            step = f"{name}-{number:03d}"
            self.run.log(f"{step}: distortion {stats.distortion:.5g} before it, {reseeded} codes re-seeded")
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
        names, codes = storage.join(self.work, "cells"), storage.join(self.work, "codes")
        self.run.log(f"sorting the vectors into {len(cells_PC)} cells")
        sizes = cells.write_cells(self.parts, cells_PC, names, self.workers).tolist()
        divide = {"proportional": kmeans.allocate, "equal": kmeans.share_equally}[self.section.split]
        shares = divide(self.section.size, sizes)
        sampled = sum(size > self.section.cell_vectors for size in sizes)
        if sampled:
            self.run.log(
                f"{sampled} cells hold more than codebook.cell_vectors={self.section.cell_vectors:,} vectors: their codes "
                "come from a sample of so many"
            )
        self.fine(names, codes, sizes, shares)
        codes_KC = cells.load_codes(codes, shares, cells_PC.shape[1])
        cell_of_K = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
        tree = Tree(cells_PC, codes_KC, cell_of_K)
        storage.write_json(storage.join(self.work, SAMPLED), sampled)
        self.keep("fine", tree)
        storage.remove(names)
        storage.remove(codes)
        return tree

    def noted_sampled(self) -> int:
        path = storage.join(self.work, SAMPLED)
        return int(storage.read_json(path)) if storage.exists(path) else 0

    def cells(self) -> Tensor:
        """Centroids of the first level by Lloyd over a sample: float32 (K1, C)."""
        done = self.kept("cells")
        if done is not None:
            return done.cells
        num = self.section.coarse
        sample = self.sampled(max(self.section.sample or max(SAMPLE_MIN, SAMPLE_A_CELL * num), num))
        self.run.log(f"{num} cells from {sum(chunk.rows for chunk in sample):,} sampled vectors")
        cells_PC = self.iterate("coarse", sample, lambda: self.seeds_of(sample, num), self.section.iterations).codes
        self.keep("cells", Tree(cells_PC, torch.empty(0, cells_PC.shape[1]), torch.empty(0, dtype=torch.int64)))
        storage.remove(storage.join(self.work, "sample"))
        return cells_PC

    def fine(self, folder: str, codes: str, sizes: list[int], shares: list[int]) -> None:
        """Codes of all cells, a task for some neighbouring cells."""
        names = [cells.cell_file(folder, chunk) for chunk in self.parts]
        section, chunk = self.section, self.parts[0]
        how = (section.seeding, section.spherical, chunk.gpus)
        settings = cells.CellSettings(chunk.width, section.iterations, self.seed, section.cell_vectors, *how)
        items, first = [], 0
        for last in range(1, len(sizes) + 1):
            if last == len(sizes) or sum(sizes[first : last + 1]) > FINE_VECTORS:
                items.append((names, codes, first, shares[first:last], settings))
                first = last
        with self.run.progress(sum(shares), "codes") as bar:
            for made in clustering.in_order(cells.fine, items, self.workers, chunk.gpus):
                bar.update(made)

    def file(self, name: str) -> str:
        return storage.join(self.work, f"{name}.safetensors")

    def kept(self, name: str) -> Tree | None:
        if not storage.exists(self.file(name)):
            return None
        loaded = load_tensors(storage.read_bytes(self.file(name)))
        return Tree(loaded["cells"], loaded["codes"], loaded["cell_of"])

    def keep(self, name: str, tree: Tree) -> None:
        tensors = {"cells": tree.cells, "codes": tree.codes, "cell_of": tree.cell_of}
        data = save_tensors({key: value.contiguous() for key, value in tensors.items()})
        storage.write_atomic(self.file(name), data)


def _probes(run: StageRun, parts: Sequence[Chunk], tree: Tree, workers: int) -> Probes:
    """How much of the tree a search sees to reach `codebook.recall` on vectors drawn from the parts."""
    wanted, num = run.recipe.codebook.recall, len(tree.cells)
    if num == 1:
        return Probes(1, 1.0, 1.0)
    folder, kept = storage.join(run.path, WORK, "recall"), storage.join(run.path, WORK, "recall.json")
    if not storage.exists(kept):
        found = recall.probes_for(parts, tree, wanted, run.recipe.seed, workers, folder)
        storage.write_json(kept, found._asdict())
        storage.remove(folder)
    probes = Probes(**storage.read_json(kept))
    told = f"{probes.recall:.2%} of held-out vectors find their nearest code in at most {probes.cells} of {num} cells"
    run.log(told if probes.cells < num else f"{told}: codebook.recall={wanted} needs all of them")
    run.scores["recall"] = probes.recall
    return probes


def _score(run: StageRun, splits: dict[str, list[Chunk]], tree: Tree, workers: int, probes: Probes) -> None:
    """Fill the stage's scores and keep the counts, one pass over all vectors, and one over the held-out ones."""
    counted: dict[str, Tensor] = {}
    for split, members in splits.items():
        if not members:
            run.log(f"no {split} vectors: their scores are left out")
            continue
        stats: PassStats = clustering.full_pass(members, tree, workers, probes=probes)
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


def _save(path: str, tree: Tree, probes: Probes) -> None:
    search = {
        "searched_cells": torch.tensor(probes.cells),
        "reach": torch.tensor(probes.reach, dtype=torch.float64),
        "recall": torch.tensor(probes.recall, dtype=torch.float64),
    }
    kept = save_tensors({"cells": tree.cells, "cell_of": tree.cell_of, **search})
    storage.write_atomic(storage.join(path, TREE), kept)
    storage.write_atomic(storage.join(path, CENTROIDS), save_tensors({"centroids": tree.codes.contiguous()}))
