"""PSNR and SSIM of images, use of a codebook, VRR of its patches.

Axis letters: B batch, H W pixels, n patches, P patch side, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def psnr(a_BCHW: Tensor, b_BCHW: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: float64 (B,).

    Equal images have inf.

    Args:
        data_range: largest minus smallest possible value; 2 for images in [-1, 1].
    """
    _same_images(a_BCHW, b_BCHW)
    error_B = (a_BCHW.double() - b_BCHW.double()).square().flatten(1).mean(-1)
    return 10 * torch.log10(data_range**2 / error_B)


def ssim(a_BCHW: Tensor, b_BCHW: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): float64 (B,).

    Gaussian 11×11 window of σ 1.5, population covariances, K1 0.01, K2 0.03; mean over channels and
    over positions where the window lies inside the image.

    Raises:
        ValueError: for an image smaller than the window.
    """
    _same_images(a_BCHW, b_BCHW)
    if min(a_BCHW.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {tuple(a_BCHW.shape[-2:])}"
        )
    a = a_BCHW.double()
    b = b_BCHW.double()
    mean_a = _blur(a)
    mean_b = _blur(b)
    var_a = _blur(a * a) - mean_a**2
    var_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1 = (0.01 * data_range) ** 2
    c2 = (0.03 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(-1)


def _blur(x_BCHW: Tensor) -> Tensor:
    """Gaussian blur at positions where the window lies inside the image."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x_BCHW.dtype, device=x_BCHW.device) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window = (window / window.sum()).expand(x_BCHW.shape[1], 1, 1, -1)
    x_BCHW = F.conv2d(x_BCHW, window, groups=x_BCHW.shape[1])
    return F.conv2d(x_BCHW, window.transpose(-1, -2), groups=x_BCHW.shape[1])


def _same_images(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected two equal (B, C, H, W)"
        )


def code_counts(codes: Tensor | Sequence[int], num_codes: int) -> Tensor:
    """How often each code occurs: int64 (K,).

    Raises:
        ValueError: for a code outside [0, K).
    """
    flat = torch.as_tensor(codes).flatten().to(torch.int64)
    if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= num_codes):
        raise ValueError(
            f"codes lie in [{int(flat.min())}, {int(flat.max())}], expected [0, {num_codes})"
        )
    return torch.bincount(flat, minlength=num_codes)


def usage(counts_K: Tensor) -> float:
    """Share of codes that occur at least once.

    It grows with the number of tokens counted: report both.
    """
    return float((counts_K > 0).double().mean())


def entropy(counts_K: Tensor) -> float:
    """Entropy of the codes in nats (plug-in estimate).

    Raises:
        ValueError: if nothing was counted.
    """
    total = float(counts_K.sum())
    if total <= 0:
        raise ValueError("entropy of 0 tokens")
    share = counts_K[counts_K > 0].double() / total
    return float(-(share * share.log()).sum())


def perplexity(counts_K: Tensor) -> float:
    """exp(entropy): the number of equally frequent codes with this entropy."""
    return math.exp(entropy(counts_K))


def imbalance(counts_K: Tensor) -> float:
    """K·Σp²: 1 if all codes occur equally often, K if only one does.

    Raises:
        ValueError: if nothing was counted.
    """
    total = float(counts_K.sum())
    if total <= 0:
        raise ValueError("imbalance of 0 tokens")
    return float((counts_K.double() / total).square().sum()) * len(counts_K)


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II matrix: float64 (size, size); row k is the k-th cosine."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (places[None] + 0.5) * places[:, None] / size) * math.sqrt(
        2 / size
    )
    matrix[0] /= math.sqrt(2)
    return matrix


def dct(patches_nCPP: Tensor) -> Tensor:
    """2-D orthonormal DCT-II of each channel of each patch: float64, same shape."""
    rows = dct_matrix(patches_nCPP.shape[-2])
    columns = dct_matrix(patches_nCPP.shape[-1])
    return rows.to(patches_nCPP.device) @ patches_nCPP.double() @ columns.to(patches_nCPP.device).T


def vrr(
    patches_nCPP: Tensor, ids_n: Tensor, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Variance reduction ratio 1 − σ_w²/σ_g² of patches with the same code (SemHiTok, arXiv
    2503.06764).

    σ_w² is the unweighted mean, over codes with at least two patches, of the variance of DCT
    coefficients within the code; σ_g² is the variance over all patches. Variances are unbiased (n −
    1) and summed over coefficients, so that random codes have an expected ratio of 0 for any code
    sizes.

    Args:
        patches_nCPP: patches of images.
        ids_n: code of each patch.

    Returns:
        The ratio, and the ratio of shuffled codes, which shows the noise.

    Raises:
        ValueError: if no code has two patches, or all patches are equal.
    """
    if len(patches_nCPP) != len(ids_n) or patches_nCPP.ndim != 4:
        raise ValueError(f"patches {tuple(patches_nCPP.shape)} with codes {tuple(ids_n.shape)}")
    x = dct(patches_nCPP).flatten(1)
    x = x - x.mean(0)
    spread = float(x.square().sum() / max(1, len(x) - 1))
    if spread <= 0:
        raise ValueError("VRR of patches that are all equal")
    shuffled = ids_n[torch.randperm(len(ids_n), generator=generator).to(ids_n.device)]
    return 1 - _within(x, ids_n) / spread, 1 - _within(x, shuffled) / spread


def _within(x_nF: Tensor, ids_n: Tensor) -> float:
    """Mean over codes of the unbiased variance within a code."""
    _, code_n, counts = torch.unique(ids_n, return_inverse=True, return_counts=True)
    sums = x_nF.new_zeros(len(counts), x_nF.shape[1]).index_add_(0, code_n, x_nF)
    deviations_n = (x_nF - (sums / counts[:, None])[code_n]).square().sum(-1)
    inside = x_nF.new_zeros(len(counts)).index_add_(0, code_n, deviations_n)
    several = counts >= 2
    if not bool(several.any()):
        raise ValueError("VRR needs a code that occurs at least twice")
    return float((inside[several] / (counts[several] - 1)).mean())
