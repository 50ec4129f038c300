"""Goal 8: JPEG to 384 x 384 pixels, CPU-seconds, against plain Pillow (decode whole, bicubic
resize, centre crop).

Eight seeded pictures of each size, quality 90, 4:2:0, both sides in turns on one thread; the
medians count. Quality: the least cosine, over pictures, between the patch features of the two
results by a SigLIP of random weights; beside it the same after the mean feature is taken away,
which is what random weights alone cannot make high, and the PSNR.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from bench.machine import report
from bench.pictures import jpeg, photo, save_encoder
from smalti.images import to_pixels

SIZE, NUM, TURNS = 384, 8, 9
GOALS = {(1024, 768): 2.0, (2048, 1536): 2.8}
GOAL_COSINE = 0.995


def plain(data: bytes) -> np.ndarray:
    """What one writes with Pillow: uint8 (SIZE, SIZE, 3)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIZE / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return np.array(image.crop((left, top, left + SIZE, top + SIZE)))


def cpu_seconds(decode: Callable[[bytes], np.ndarray], files: list[bytes]) -> float:
    started = time.process_time()
    for data in files:
        decode(data)
    return time.process_time() - started


def ours(data: bytes) -> np.ndarray:
    return to_pixels(data, SIZE)


def quality(encoder: object, files: list[bytes]) -> tuple[float, float, float]:
    """(least cosine, least cosine without the mean feature, least PSNR in dB) over the files."""
    import torch
    import torch.nn.functional as F

    def features(pixels: np.ndarray) -> torch.Tensor:
        batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            return encoder(batch)[0]  # type: ignore[operator, no-any-return]

    pairs = [(ours(data), plain(data)) for data in files]
    encoded = [(features(a), features(b)) for a, b in pairs]
    mean = torch.cat([b for _, b in encoded]).mean(0)
    cosine = min(float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in encoded)
    centred = min(float(F.cosine_similarity(a - mean, b - mean, dim=-1).mean()) for a, b in encoded)
    errors = [float(np.square(a.astype(float) - b.astype(float)).mean()) for a, b in pairs]
    return cosine, centred, 10 * np.log10(255**2 / max(errors))


def main() -> None:
    from smalti.tokenizers.encoders import VisionEncoder

    with tempfile.TemporaryDirectory() as folder:
        print(save_encoder(folder, SIZE, 16, 192, 4))
        encoder = VisionEncoder.from_pretrained(folder)
    ratios, cosines, met = {}, [], True
    for (width, height), goal in GOALS.items():
        files = [jpeg(photo(seed, width, height)) for seed in range(NUM)]
        for side in (ours, plain):
            cpu_seconds(side, files)
        times = [(cpu_seconds(ours, files), cpu_seconds(plain, files)) for _ in range(TURNS)]
        ours_s, plain_s = (statistics.median(side) / NUM for side in zip(*times, strict=True))
        cosine, centred, psnr = quality(encoder, files)
        name = f"{width}x{height}"
        ratios[name] = round(plain_s / ours_s, 2)
        cosines.append(cosine)
        met = met and plain_s / ours_s >= goal and cosine >= GOAL_COSINE
        print(
            f"{name}: {1000 * ours_s:.2f} ms an image, plain Pillow {1000 * plain_s:.2f} ms, {ratios[name]}x (goal {goal}x);"
            f" cosine {cosine:.4f}, without the mean {centred:.4f}, PSNR {psnr:.1f} dB, {len(files[0]) // 1000} KB a file"
        )
    report(8, ratio=min(ratios.values()), quality=min(cosines), met=met, ratios=ratios)


if __name__ == "__main__":
    main()
