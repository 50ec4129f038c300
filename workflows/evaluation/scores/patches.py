"""Patches of images, and the gallery of patches that share a code.

B images, T = h·w tokens, N = B·T patches.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from smalti.workflows.evaluation.scores.tables import GalleryRow

ROWS = 12
PATCHES_A_ROW = 8
PICTURE_SIDE = 96
DIM = 0.35  # contrast of the surroundings of a patch


def cut_patches(bhwc: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Patches of uint8 (B, H, W, 3): (B·h·w, H // h, W // w, 3).

    In token order (row by row). A remainder that the grid does not cover (384 px, patch 14) is left
    out at the right and at the bottom.
    """
    batch, height, width, channels = bhwc.shape
    rows, columns = grid
    tall = height // rows
    wide = width // columns
    cut = bhwc[:, : rows * tall, : columns * wide].reshape(
        batch, rows, tall, columns, wide, channels
    )
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, tall, wide, channels)


def gallery(
    bhwc: np.ndarray, ids_BT: np.ndarray, grid: tuple[int, int], seed: int
) -> tuple[list[GalleryRow], dict[str, np.ndarray]]:
    """Rows of up to 8 patches that share a code, and their pictures.

    Half of the rows are the codes with the most detail (pixel variance), half are spread over the
    codes by frequency; the patches of a row come from different images. A code needs patches from
    at least three images.
    """
    flat_N = ids_BT.reshape(-1)
    detail_N = cut_patches(bhwc, grid).reshape(len(flat_N), -1).astype(np.float32).std(axis=1)
    image_N = np.repeat(np.arange(len(bhwc)), ids_BT.shape[1])
    codes, counts = np.unique(flat_N, return_counts=True)
    detail = np.bincount(flat_N, weights=detail_N)[codes] / counts
    rng = np.random.default_rng(seed)
    lines: list[GalleryRow] = []
    pictures: dict[str, np.ndarray] = {}
    for code, count in _order(codes, counts, detail):
        places = rng.permutation(np.flatnonzero(flat_N == code))
        _, first = np.unique(image_N[places], return_index=True)
        chosen = places[np.sort(first)][:PATCHES_A_ROW]
        if len(chosen) < 3:
            continue
        names: list[str] = []
        for place in chosen:
            names.append(f"code-{len(lines):02d}-{len(names)}")
            pictures[names[-1]] = in_context(
                bhwc[image_N[place]], grid, int(place % ids_BT.shape[1])
            )
        lines.append(
            {"code": int(code), "patches": int(count), "images": len(first), "pictures": names}
        )
        if len(lines) == ROWS:
            break
    return lines, pictures


def _order(codes: np.ndarray, counts: np.ndarray, detail: np.ndarray) -> list[tuple[int, int]]:
    """(code, patches) in the order in which rows are tried.

    Detailed and spread codes in turn, each once.
    """
    usable = np.flatnonzero(counts >= 3)
    detailed = usable[np.argsort(-detail[usable], kind="stable")]
    by_use = usable[np.argsort(-counts[usable], kind="stable")]
    step = max(1, len(by_use) // (ROWS // 2))
    spread = (
        np.concatenate([by_use[start::step] for start in range(step)]) if len(by_use) else by_use
    )
    order: dict[int, int] = {}
    for one, other in zip(detailed, spread, strict=True):
        for index in (one, other):
            order.setdefault(int(codes[index]), int(counts[index]))
    return list(order.items())


def in_context(hwc: np.ndarray, grid: tuple[int, int], token: int) -> np.ndarray:
    """The patch of a token with its surroundings, which are dimmed.

    Enlarged to about 96 px with hard pixel edges.
    """
    tall = hwc.shape[0] // grid[0]
    wide = hwc.shape[1] // grid[1]
    top = (token // grid[1]) * tall
    left = (token % grid[1]) * wide
    padded = np.pad(hwc, ((tall, tall), (wide, wide), (0, 0)), mode="edge")
    view = padded[top : top + 3 * tall, left : left + 3 * wide].astype(np.float32)
    dimmed = view * DIM + 128 * (1 - DIM)
    dimmed[tall : 2 * tall, wide : 2 * wide] = view[tall : 2 * tall, wide : 2 * wide]
    margin = (tall // 2, wide // 2)
    crop = (
        dimmed[margin[0] : 3 * tall - margin[0], margin[1] : 3 * wide - margin[1]]
        .round()
        .astype(np.uint8)
    )
    scale = max(1, PICTURE_SIDE // max(crop.shape[:2]))
    return np.asarray(
        Image.fromarray(crop).resize(
            (crop.shape[1] * scale, crop.shape[0] * scale), Image.Resampling.NEAREST
        )
    )
