"""Measure how many cells a search must visit to find the nearest code.

Axis letters as in `passes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smalti import storage
from smalti.tokenizers.code_index import CodeIndex, Probes
from smalti.workflows.codebook.passes import Chunk, sample
from smalti.workflows.codebook.tasks import in_order
from smalti.workflows.codebook.tree import Tree
from smalti.workflows.pipeline.stage import StageRun

VECTORS, MOST_VECTORS = 4_096, 32_768  # sampled; each is compared with all K codes
MISSED = 16  # expected misses at the recall of the recipe, within these bounds
TASK_VECTORS = 512
FILL_CHUNKS = 64  # at most, from which training vectors are sampled


def work(run: StageRun) -> str:
    """Folder of the intermediate results of stage `codebook`."""
    return storage.join(run.path, "work")


def draw(
    run: StageRun, parts: Sequence[Chunk], held_out: Sequence[Chunk], workers: int
) -> tuple[list[Chunk], list[Chunk]]:
    """Seeded samples of held-out vectors and, if these are too few, of training ones.

    A pass over the held-out vectors, which also checks them; if they are too few and there are
    cells to search, a read of at most `FILL_CHUNKS` training chunks. Empty if `probes` is finished.
    """
    if storage.exists(_noted(run)):
        return [], []
    section = run.recipe.codebook
    seed = run.recipe.seed
    folder = storage.join(work(run), "recall")
    wanted = num_vectors(section.recall)
    first = (
        sample(held_out, wanted, seed, workers, storage.join(folder, "held_out"))
        if held_out
        else []
    )
    missing = wanted - sum(chunk.rows for chunk in first)
    if missing <= 0 or section.coarse == 1:
        return first, []
    some = parts[:: -(-len(parts) // FILL_CHUNKS)]
    return first, sample(some, missing, seed, workers, storage.join(folder, "train"))


def probes(
    run: StageRun, drawn: tuple[list[Chunk], list[Chunk]], tree: Tree, workers: int
) -> Probes:
    """The search that reaches `codebook.recall` on the sampled vectors.

    It is logged, added to the scores and saved.
    """
    wanted = run.recipe.codebook.recall
    num = len(tree.cell_of.unique())
    if len(tree.cells) == 1:
        return Probes(1, 1.0, 1.0)
    if not storage.exists(_noted(run)):
        found = probes_for([chunk for chunks in drawn for chunk in chunks], tree, wanted, workers)
        held_out, training = (sum(chunk.rows for chunk in chunks) for chunks in drawn)
        storage.write_json(
            _noted(run), {"probes": found, "held-out": held_out, "training": training}
        )
        storage.remove(storage.join(work(run), "recall"))
    noted = storage.read_json(_noted(run))
    seen = Probes(*noted["probes"])
    counts = {name: noted[name] for name in ("held-out", "training")}
    whose = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    message = (
        f"{seen.recall:.2%} of {whose} vectors find their nearest code in at most {seen.cells} "
        f"of {num} cells"
    )
    run.log(
        message if seen.cells < num else f"{message}: codebook.recall={wanted} needs all of them"
    )
    run.scores |= {"recall": seen.recall, "vectors/recall": sum(counts.values())}
    return seen


def _noted(run: StageRun) -> str:
    return storage.join(work(run), "recall.json")


def probes_for(drawn: Sequence[Chunk], tree: Tree, recall: float, workers: int) -> Probes:
    """The smallest search that reaches a recall@1 on these vectors."""
    shared = tree.shared()
    step = -(-sum(chunk.rows for chunk in drawn) // TASK_VECTORS)
    items = [
        (chunk, shared, first, step) for chunk in drawn for first in range(min(step, chunk.rows))
    ]
    cells, reaches = zip(*in_order(_needs, items, workers, drawn[0].gpus), strict=True)
    return Probes.reaching(torch.cat(cells), torch.cat(reaches), recall)


def num_vectors(recall: float) -> int:
    """Vectors to measure a recall on; a recall closer to 1 needs more."""
    return round(min(MOST_VECTORS, max(VECTORS, MISSED / max(1 - recall, 1e-9))))


def _needs(
    chunk: Chunk, shared: tuple[np.ndarray, ...], first: int, step: int
) -> tuple[Tensor, Tensor]:
    """Task of `probes_for` on every `step`-th vector of a chunk."""
    tree = Tree.of_shared(shared, chunk.device)
    x_NC = torch.cat(list(chunk.vectors()))[first::step]
    cells_N, reach_N = CodeIndex(tree.codes, tree.cells, tree.cell_of).needs(x_NC)
    return cells_N.cpu(), reach_N.cpu()
