"""H100: images a second through SigLIP-so400m, fed from memory and fed from JPEG files, as the
stage `features` runs it.

Goals: 45 % MFU or more; fed from JPEG at 0.9 of the rate from memory or more. Model FLOPs are those
of the forward pass, counted by torch. The files are decoded by processes beside the GPU, which hand
over whole batches of uint8 pixels. Either way a batch of pixels goes to the GPU and its float16
features come back to the CPU, while the next one is computed.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from bench import gpu
from bench.pictures import jpeg, photo
from smalti import images
from smalti.tokenizers.encoders import VisionEncoder, as_set, batches, on_host
from smalti.workflows.plan.configs import vision_config

GOALS = {"MFU": (">=", 0.45), "fed from JPEG / from memory": (">=", 0.9)}
PART = 32  # images that a process decodes at once


def decoded(task: tuple[list[bytes], int]) -> np.ndarray:
    """uint8 (B, S, S, 3) of JPEG files; in a process of its own."""
    files, size = task
    return np.stack([images.to_pixels(file, size) for file in files])


def in_order(
    pool: Executor, call: Callable[[Any], Any], tasks: Iterable[Any], window: int
) -> Iterator[Any]:
    """Results of `call` of each task, in order; at most `window` are under way or wait at once."""
    running: deque[Future[Any]] = deque()
    for task in tasks:
        running.append(pool.submit(call, task))
        if len(running) == window:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def from_files(
    files: list[bytes], size: int, batch: int, num: int, workers: int
) -> Iterator[np.ndarray]:
    """`num` batches decoded by `workers` processes, in order; all processes are up before the first
    `next` returns.
    """
    part = math.gcd(batch, PART)
    tasks = (
        ([files[(start + i) % len(files)] for i in range(part)], size)
        for start in range(0, num * batch, part)
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=context.Barrier(workers, timeout=300).wait
    ) as pool:
        list(pool.map(decoded, [(files[:1], size)] * workers))  # none begins before all have come
        yield np.empty(0)
        parts = in_order(pool, decoded, tasks, 2 * workers)
        for _ in range(num):
            yield np.concatenate(list(itertools.islice(parts, batch // part)))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    asked = gpu.arguments(__doc__, argv)
    batch, num, workers = (4, 2, 0) if asked.tiny else (256, 40, max(1, (os.cpu_count() or 2) - 2))
    if asked.tiny:
        config = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    else:
        config, _ = vision_config("google/siglip-so400m-patch14-384")
    torch.manual_seed(0)
    encoder = VisionEncoder(SiglipVisionModel(config)).to(asked.device)
    encode = as_set(encoder, asked.device, "bf16", compile=not asked.tiny)
    size = encoder.image_size

    def run(feed: Iterable[np.ndarray]) -> None:
        with torch.inference_mode():
            parts = (part for pixels in feed for part in batches(pixels, batch, asked.device))
            for _ in on_host(encode(part).half() for part in parts):
                pass

    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, size, size, device=asked.device))
    flops = counter.get_total_flops()
    took = gpu.seconds(lambda: run(itertools.repeat(pixels, num)), asked.device, 1, warm=1)
    memory_rate = batch * num / took
    files = [
        jpeg(photo(seed, *((64, 48) if asked.tiny else (640, 480))))
        for seed in range(2 if asked.tiny else 64)
    ]
    if workers:
        feed = from_files(files, size, batch, num, workers)
        next(feed)
    else:
        feed = iter([decoded(([files[i % 2] for i in range(batch)], size))] * num)
    files_rate = batch * num / gpu.seconds(lambda: run(feed), asked.device, 1, warm=0)
    rows = [
        ("images a second, from memory", memory_rate, "1/s"),
        ("FLOPs an image", flops / 1e9, "GFLOP"),
        ("MFU", gpu.peak_share(flops * memory_rate, asked.device), ""),
        (f"images a second, from JPEG, {workers} processes", files_rate, "1/s"),
        ("fed from JPEG / from memory", files_rate / memory_rate, ""),
    ]
    gpu.report("gpu_encoder: SigLIP-so400m features", rows, GOALS, asked)


if __name__ == "__main__":
    main()
