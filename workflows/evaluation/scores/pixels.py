"""Pixels between files, models and pictures. Axes: B images, C channels, H height, W width."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LONGEST_SIDE = 256  # of a picture in the report


def to_model(bhwc_uint8: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [-1, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(bhwc_uint8))
        .permute(0, 3, 1, 2)
        .float()
        .div_(127.5)
        .sub_(1.0)
    )


def to_uint8(pixels_BCHW: Tensor) -> np.ndarray:
    """Float (B, 3, H, W) in [-1, 1], clipped, as uint8 (B, H, W, 3)."""
    scaled = pixels_BCHW.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def thumbnail(hwc: np.ndarray, longest: int = LONGEST_SIDE) -> np.ndarray:
    """The picture, at most `longest` pixels per side; never enlarged."""
    from PIL import Image

    if max(hwc.shape[:2]) <= longest:
        return hwc
    image = Image.fromarray(hwc)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(image)
