"""Stage `codebook`: two-level k-means over the feature shards.

The K1 cells come from k-means of a seeded sample. Each vector is assigned to its nearest cell, each
cell gets its share of the K codes (in proportion to its vectors, or equal), and k-means runs in
each cell. `polish` adds Lloyd passes over all vectors, searching the nearest cells. With K1 = 1 it
is flat k-means over all vectors. The result has exactly K distinct codes, or the stage fails; with
`codebook.duplicates: drop` it has as many as are distinct.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from smalti import storage
from smalti.artifact import Artifact
from smalti.errors import ConfigError, DataError
from smalti.schema import Recipe, result_settings
from smalti.tokenizers import tensor_files
from smalti.tokenizers.code_index import Probes
from smalti.tokenizers.codebook import CENTROIDS, TREE
from smalti.tokenizers.metrics import entropy, imbalance, perplexity, usage
from smalti.tracking import Tracker
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.codebook import passes, recall
from smalti.workflows.codebook.build import CodebookBuild, check_reach
from smalti.workflows.codebook.histogram import sizes_picture
from smalti.workflows.codebook.passes import Chunk, PassStats
from smalti.workflows.codebook.tree import Tree
from smalti.workflows.pipeline.stage import Body, StageRun, find_artifact, run_stage

COUNTS = "counts.safetensors"
PICTURE = "sizes.png"


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The codebook artifact; codes are in the order of their cells.

    Files:
        `centroids.safetensors`: `centroids`, float32 (K, C).
        `tree.safetensors`: `cells` (K1, C), `cell_of` int64 (K,), `searched_cells` and `reach` for
            `CodeIndex.tree`, and
            `recall`, the share of held-out vectors that this search assigns to their nearest code.
        `counts.safetensors`: vectors per code, `train` and, if some are held out, `val`: int64
            (K,).
        `sizes.png`: a chart of the counts.

    Scores: `recall`; for train and val each the distortion (mean squared distance), entropy (nats),
    perplexity, usage, imbalance (K·Σp²) and the number of vectors.

    Raises:
        ConfigError: if the section's settings do not fit together.
        DataError: if there are too few vectors, or too few distinct ones.
    """
    parents = {"features": find_artifact(recipe, "features")}
    config = result_settings(recipe.codebook) | {"seed": recipe.seed}
    return run_stage(
        recipe, "codebook", "codebook", config, parents, _body(parents["features"]), tracker=tracker
    )


def check(recipe: Recipe) -> None:
    """Raise ConfigError if there are more cells than codes, or too few vectors per cell."""
    section = recipe.codebook
    if section.coarse > section.size and recipe.clusters:
        raise ConfigError(
            f"codebook.coarse={section.coarse} cells for codebook.size={section.size} codes; every "
            "cell needs one. Lower codebook.coarse."
        )
    if section.coarse > 1 and recipe.clusters:
        check_reach(section, section.coarse * section.cell_vectors)


def _body(features: Artifact) -> Body:
    def body(run: StageRun) -> dict[str, int]:
        section = run.recipe.codebook
        check(run.recipe)
        parts, held_out = _chunks(run.recipe, features.path)
        num_vectors = sum(chunk.rows for chunk in parts)
        if num_vectors < section.size:
            raise DataError(
                f"codebook.size={section.size}, but {features.path} holds only {num_vectors} "
                "training vectors. Set a smaller codebook.size, more features.patches, or use "
                "more images."
            )
        workers = max(run.recipe.resources.readers, run.recipe.resources.actors)
        with ensure_ray(run.recipe):
            # reads all held-out vectors: reports bad ones early
            drawn = recall.draw(run, parts, held_out, workers)
            tree, counts = CodebookBuild(run, parts, workers).tree()
            probes = recall.probes(run, drawn, tree, workers)
            counted = _score(run, {"train": parts, "val": held_out}, tree, workers, probes)
        zeros = num_vectors - int(counted["train"].sum())
        if zeros:
            run.log(f"{zeros} training vectors are 0, which has no direction, and were left out")
        _save(run.path, tree, probes)
        storage.remove(recall.work(run))
        return {
            "codes": len(tree.codes),
            "cells": len(tree.cells),
            "searched_cells": probes.cells,
            "vectors": num_vectors,
            "zero_vectors": zeros,
            **counts,
        }

    return body


def _chunks(recipe: Recipe, path: str) -> tuple[list[Chunk], list[Chunk]]:
    """Chunks of the train and val vectors.

    Raises:
        DataError: if their widths differ.
    """
    gpus = recipe.resources.gpus_per_worker
    spherical = recipe.codebook.spherical
    device = "cuda" if gpus and recipe.resources.device == "auto" else "cpu"
    parts, held_out = (
        [
            replace(chunk, spherical=spherical, gpus=gpus, device=device)
            for chunk in passes.chunks(path, split)
        ]
        for split in ("train", "val")
    )
    if parts and held_out and parts[0].width != held_out[0].width:
        raise DataError(
            f"{path}: train vectors have {parts[0].width} numbers, val vectors "
            f"{held_out[0].width}. Remove {path} and compute the features again with one encoder."
        )
    return parts, held_out


def _score(
    run: StageRun, splits: dict[str, list[Chunk]], tree: Tree, workers: int, probes: Probes
) -> dict[str, Tensor]:
    """Fill the scores and write the vectors per code, by split: one pass over each."""
    counted: dict[str, Tensor] = {}
    for split, members in splits.items():
        if not members:
            run.log(f"no {split} vectors: their scores are left out")
            continue
        stats: PassStats = passes.full_pass(members, tree, workers, probes=probes)
        counted[split] = stats.counts
        run.scores |= {
            f"distortion/{split}": stats.distortion,
            f"entropy/{split}": entropy(stats.counts),
            f"perplexity/{split}": perplexity(stats.counts),
            f"usage/{split}": usage(stats.counts),
            f"imbalance/{split}": imbalance(stats.counts),
            f"vectors/{split}": int(stats.counts.sum()),
        }
    tensor_files.write(storage.join(run.path, COUNTS), counted)
    picture = sizes_picture(counted["train"], "training vectors per code")
    storage.write_atomic(storage.join(run.path, PICTURE), picture)
    shown = {
        key: f"{value:.4g}"
        for key, value in run.scores.items()
        if not key.startswith(("vectors", "entropy"))
    }
    run.log(", ".join(f"{key} {value}" for key, value in shown.items()))
    return counted


def _save(path: str, tree: Tree, probes: Probes) -> None:
    search = {
        "searched_cells": torch.tensor(probes.cells),
        "reach": torch.tensor(probes.reach, dtype=torch.float64),
        "recall": torch.tensor(probes.recall, dtype=torch.float64),
    }
    tensor_files.write(
        storage.join(path, TREE), {"cells": tree.cells, "cell_of": tree.cell_of, **search}
    )
    tensor_files.write(storage.join(path, CENTROIDS), {"centroids": tree.codes})
