"""Code usage, perplexity, entropy, and variance explained (VRR).

Usage, perplexity and entropy are counted over all tokens of the held-out rows; `n` is the number of
tokens. With fewer tokens than codes, usage is below one in any case; the table `codes` says so. N
patches, T tokens per image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from smalti.tokenizers.metrics import code_counts, entropy, perplexity, usage, vrr
from smalti.workflows.evaluation.scores.heldout import HeldOut, choose
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.patches import cut_patches, gallery
from smalti.workflows.evaluation.scores.tables import Histogram

HISTOGRAM_POINTS = 256


def measure_codes(data: HeldOut, models: Models) -> MeasureResult:
    """Usage, perplexity, entropy (nats) and VRR of the codes.

    With guidance, also of the semantic codes. Of DualToken, of its pixel and its semantic codes:
    the codes of all depths are counted together, and VRR uses the first.
    """
    tokenizer = models.tokenizer
    codes_NT = np.stack([row.codes for row in data.rows])
    chosen = choose(len(data.rows), data.job.evaluate.vrr_images, data.job.seed + 3)
    pixels = data.pixels([data.rows[index] for index in chosen])
    patches_NHWC = cut_patches(pixels, tokenizer.grid)
    result = MeasureResult()
    levels = levels_of(tokenizer, codes_NT)
    guided = "semantic_" in levels
    for prefix, (ids_NT, every, num_codes) in levels.items():
        counts = code_counts(torch.from_numpy(every), num_codes).numpy()
        result.scores |= count_scores(prefix, counts)
        result.tables[f"{prefix}histogram"] = histogram(counts)
        score = _vrr_score(patches_NHWC, ids_NT[chosen].reshape(-1), data.job.seed)
        if score is not None:
            result.scores[f"codes/{prefix}vrr"] = score
    ids_NT = levels["semantic_" if guided else ""][0]
    result.tables["gallery"], pictures = gallery(
        pixels, ids_NT[chosen], tokenizer.grid, data.job.seed
    )
    result.tables["gallery_of"] = "semantic" if guided else "flat"
    result.pictures |= pictures
    return result


def levels_of(tokenizer: Any, codes: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Codes to measure, by the prefix of their scores.

    Returns:
        For each prefix: the code of each token (N, T), all codes that are counted, and the size of
        the codebook.
    """
    # several codes per token: pixel before semantic, each of several depths
    if tokenizer.code_shape:
        halves = {"": codes[:, :, 0], "semantic_": codes[:, :, 1]}
        return {
            prefix: (half[..., 0], np.ascontiguousarray(half), tokenizer.num_codes)
            for prefix, half in halves.items()
        }
    levels = {"": (codes, codes, tokenizer.num_codes)}
    if tokenizer.num_semantic:
        semantic = codes // tokenizer.num_sub
        levels["semantic_"] = (semantic, semantic, tokenizer.num_semantic)
    return levels


def count_scores(prefix: str, counts: np.ndarray) -> dict[str, Score]:
    """Usage in [0, 1], perplexity in [1, K] and entropy in nats.

    Args:
        counts: int64 (K,).
    """
    counts_K = torch.from_numpy(counts)
    total = int(counts.sum())
    return {
        f"codes/{prefix}usage": Score(usage(counts_K), total),
        f"codes/{prefix}perplexity": Score(perplexity(counts_K), total),
        f"codes/{prefix}entropy": Score(entropy(counts_K), total),
    }


def histogram(counts: np.ndarray) -> Histogram:
    """Counts in descending order, as (rank, count) points.

    At most `HISTOGRAM_POINTS` of them, evenly spaced in the logarithm of the rank.
    """
    ordered = np.sort(counts)[::-1]
    ranks = np.unique(
        np.geomspace(1, len(ordered), min(HISTOGRAM_POINTS, len(ordered))).round().astype(int)
    )
    return {
        "points": [[int(rank), int(ordered[rank - 1])] for rank in ranks],
        "codes": len(ordered),
        "used": int((ordered > 0).sum()),
        "tokens": int(ordered.sum()),
    }


def _vrr_score(patches_NHWC: np.ndarray, ids_N: np.ndarray, seed: int) -> Score | None:
    """VRR, with that of shuffled ids as baseline.

    None if it is undefined: no code has two patches, or all patches are equal.
    """
    if np.bincount(ids_N).max() < 2 or not (patches_NHWC != patches_NHWC[0]).any():
        return None
    patches_NCHW = (
        torch.from_numpy(np.ascontiguousarray(patches_NHWC.transpose(0, 3, 1, 2))).float() / 255
    )
    generator = torch.Generator().manual_seed(seed)
    value, shuffled = vrr(patches_NCHW, torch.from_numpy(ids_N.astype(np.int64)), generator)
    return Score(value, len(ids_N), baseline={"shuffled": shuffled})
