"""Codes that say something: no NaN, no Inf, none twice. Axis letters as in `clustering`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from smalti.errors import DataError
from smalti.workflows.clustering import Chunk, Tree, full_pass, placed


def unusable(codes_KC: Tensor) -> Tensor:
    """Which codes hold NaN or Inf, or repeat an earlier one exactly: bool (K,)."""
    bad_K = ~torch.isfinite(codes_KC).all(-1)
    known: set[bytes] = set()
    for code, row in enumerate(codes_KC):
        name = _name(row)
        bad_K[code] |= name in known
        known.add(name)
    return bad_K


def without(tree: Tree, bad_K: Tensor) -> Tree:
    """The tree without these codes."""
    return Tree(tree.cells, tree.codes[~bad_K], tree.cell_of[~bad_K])


def replaced(parts: Sequence[Chunk], tree: Tree, bad_K: Tensor, workers: int) -> Tree:
    """The tree with every bad code put on a vector that is no code yet, the farthest first. One pass.

    Errors: DataError when there are fewer distinct vectors than codes.
    """
    missing, kept = int(bad_K.sum()), without(tree, bad_K)
    known = {_name(row) for row in kept.codes}
    fresh: list[Tensor] = []
    vectors: Iterator[Tensor] = iter(full_pass(parts, kept, workers).far if len(kept.codes) else ())
    for source in (vectors, (x for chunk in parts for _, x_NC in chunk.on_cpu().vectors() for x in x_NC)):
        for x_C in source:
            if len(fresh) == missing:
                break
            name = _name(x_C)
            if name not in known:
                known.add(name)
                fresh.append(x_C)
    if len(fresh) < missing:
        num = len(kept.codes) + len(fresh)
        raise DataError(
            f"codebook.size={len(bad_K)}, but the features hold only {num} distinct vectors. "
            f"Set codebook.size to at most {num}, or use more images or patches."
        )
    codes_KC = tree.codes.clone()
    codes_KC[bad_K] = torch.stack(fresh)
    return placed(tree.with_codes(codes_KC))


def _name(x_C: Tensor) -> bytes:
    """Equal for equal vectors: 16 bytes, so that the names of all codes take little."""
    return hashlib.blake2b((x_C + 0.0).numpy().tobytes(), digest_size=16).digest()
