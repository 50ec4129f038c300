"""Vectors for the benchmarks of k-means and code assignment: planted like patch features, or those
of a features artifact.

Axis letters: N vectors, C their width, P patches of an image.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from smalti import shards

INNER = 24
CLUSTERS = 300


def add_options(options: argparse.ArgumentParser) -> None:
    """`--features`, `--window` and `--turns`, which these benchmarks share."""
    options.add_argument(
        "--features", help="a features artifact whose vectors are used; default: planted ones"
    )
    options.add_argument(
        "--window",
        type=int,
        choices=[1, 3],
        default=1,
        help="1; or 3: a patch beside its neighbours, 9 times as wide",
    )
    options.add_argument("--turns", type=int, default=3)


def chosen(asked: argparse.Namespace, held: int, num: int, width: int) -> tuple[Tensor, Tensor]:
    """`held` vectors to judge by and `num` to train on, as the options say (fewer if the artifact
    has fewer): float32 (N, C).

    Of an artifact those to judge by are of other images, image by image; the others are in random
    order.
    """
    if asked.features is None:
        x_NC = planted(held + num, width)
        return x_NC[:held], x_NC[held:].contiguous()
    held_NC, train_NC = stored(asked.features, asked.window, held)
    return held_NC, train_NC[:num]


def described(asked: argparse.Namespace) -> str:
    """What the vectors are, in a word."""
    return (
        "planted"
        if asked.features is None
        else "features" + (", 3 x 3 patches" if asked.window > 1 else "")
    )


def planted(num: int, width: int) -> Tensor:
    """Vectors near a 24-dimensional plane in 300 clusters of sizes ∝ 1/rank, with noise: float32
    (num, width).

    A cluster's spread is a half of that of the clusters' centres; the noise is 1 % of a channel's
    variance within a cluster.
    """
    draw = torch.Generator().manual_seed(0)
    sizes = 1 / torch.arange(1, CLUSTERS + 1).float()
    centres = torch.randn(CLUSTERS, INNER, generator=draw) * 2
    low = centres[sizes.multinomial(num, replacement=True, generator=draw)] + torch.randn(
        num, INNER, generator=draw
    )
    noise = 0.1 * torch.randn(num, width, generator=draw)
    return low @ torch.randn(INNER, width, generator=draw) / INNER**0.5 + noise


def stored(path: str, window: int, held: int) -> tuple[Tensor, Tensor]:
    """`held` vectors (at most a quarter) and the others of the training images of a features
    artifact that holds all patches, none of an image on both sides: float32 (N, C·window²).

    With a window a vector is that of a patch and of its neighbours; those at the edge of an image
    are left out.
    """
    keys, draw = shards.list_shards(path, "train"), torch.Generator().manual_seed(0)
    parts = [_windows(shards.read_shard(path, key, ["patch", "vector"]), window) for key in keys]
    x_BPC = torch.from_numpy(np.concatenate(parts))
    order = torch.randperm(len(x_BPC), generator=draw)
    images = min(-(-held // x_BPC.shape[1]), len(x_BPC) // 4)
    held_NC, train_NC = (x_BPC[part].flatten(0, 1) for part in (order[:images], order[images:]))
    return held_NC[:held], train_NC[torch.randperm(len(train_NC), generator=draw)]


def _windows(shard: pa.Table, window: int) -> np.ndarray:
    """float32 (images, patches, C·window²)."""
    x_NC = shards.vectors(shard).astype(np.float32)
    side = round((int(np.max(shard["patch"].to_numpy())) + 1) ** 0.5)
    if window == 1:
        return x_NC.reshape(-1, side**2, x_NC.shape[1])
    images = x_NC.reshape(-1, side, side, x_NC.shape[1])
    # (B, rows, columns, C, w, w)
    view = np.lib.stride_tricks.sliding_window_view(images, (window, window), (1, 2))
    return view.reshape(len(images), -1, x_NC.shape[1] * window**2)
