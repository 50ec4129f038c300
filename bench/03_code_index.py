"""Goal 3: 64K codes x 1152, vectors assigned through the training tree, against brute force, faiss IVF and faiss HNSW.

The number of cells (and each peer's own probes) is chosen on one held-out half for a recall@1 of 0.999 against exact
search and measured on the other. All sides run on one thread, in turns; the medians of CPU-seconds count.
`--features PATH` takes the vectors of a features artifact instead of the synthetic ones; `--codes`, `--turns`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faiss
import numpy as np
import torch
from torch import Tensor

from bench.machine import machine
from smalti import shards
from smalti.tokenizers import kmeans
from smalti.tokenizers.code_index import CodeIndex

WIDTH, RECALL, HELD_OUT, GOALS = 1152, 0.999, 8192, {"brute": 15.0, "ivf": 5.0, "hnsw": 3.0}


def synthetic(num: int) -> Tensor:
    """Vectors near a 24-dimensional surface in 300 clusters of unequal size, with noise: float32 (num, 1152)."""
    draw = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, 301).float()
    centres = torch.randn(300, 24, generator=draw) * 2
    low = centres[weights.multinomial(num, replacement=True, generator=draw)] + torch.randn(num, 24, generator=draw)
    return low @ torch.randn(24, WIDTH, generator=draw) / 24**0.5 + 0.1 * torch.randn(num, WIDTH, generator=draw)


def stored(path: str) -> Tensor:
    """The training vectors of a features artifact in random order: float32 (N, C)."""
    keys = shards.list_shards(path, "train")
    parts = [shards.vectors(shards.read_shard(path, key, ["vector"])).astype(np.float32) for key in keys]
    x_NC = torch.from_numpy(np.concatenate(parts))
    return x_NC[torch.randperm(len(x_NC), generator=torch.Generator().manual_seed(0))]


def trained(x_NC: Tensor, num: int) -> CodeIndex:
    """Codes in cells as the stage makes them: cells from a sample, K shared by cell size, k-means in each cell."""
    draw = torch.Generator().manual_seed(1)
    cells = kmeans.kmeans(x_NC[:32_768], max(2, int(num**0.5)), 5, draw)
    home = kmeans.assign(x_NC, cells)[0]
    shares = kmeans.allocate(num, torch.bincount(home, minlength=len(cells)).tolist())
    codes = [kmeans.kmeans(x_NC[home == i], share, 2, draw) for i, share in enumerate(shares) if share]
    return CodeIndex(torch.cat(codes), cells, torch.repeat_interleave(torch.arange(len(cells)), torch.tensor(shares)))


def reaching(search: Callable[[int], Tensor], wanted: Tensor) -> int:
    """The fewest probes, doubled from 1 and then narrowed, whose answers agree with `wanted` at the recall asked for."""

    def enough(probes: int) -> bool:
        return float((search(probes) == wanted).double().mean()) >= RECALL

    high = 1
    while high < 4096 and not enough(high):
        high *= 2
    low = high // 2 + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def cpu_seconds(work: Callable[[], Tensor]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--features")
    options.add_argument("--codes", type=int, default=65_536)
    options.add_argument("--turns", type=int, default=5)
    asked = options.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    x_NC = stored(asked.features) if asked.features else synthetic(3 * asked.codes + 2 * HELD_OUT)
    held = min(HELD_OUT, len(x_NC) // 8)
    choose, test, train = x_NC[:held], x_NC[held : 2 * held], x_NC[2 * held :]
    index = trained(train, min(asked.codes, len(train) // 3))
    cells, _ = index.cells_for(choose, RECALL)
    codes, width = index.codes.numpy(), index.codes.shape[1]
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, len(index.cells))
    ivf.train(codes)
    ivf.add(codes)
    hnsw = faiss.IndexHNSWFlat(width, 32)
    hnsw.add(codes)

    def by_ivf(x: Tensor, probes: int) -> Tensor:
        ivf.nprobe = probes
        return torch.from_numpy(ivf.search(x.numpy(), 1)[1][:, 0])

    def by_hnsw(x: Tensor, probes: int) -> Tensor:
        hnsw.hnsw.efSearch = probes
        return torch.from_numpy(hnsw.search(x.numpy(), 1)[1][:, 0])

    wanted = index.exact(choose)[0]
    nprobe = reaching(lambda probes: by_ivf(choose, probes), wanted)
    ef = reaching(lambda probes: by_hnsw(choose, probes), wanted)
    sides: dict[str, Callable[[], Tensor]] = {
        "tree": lambda: index.tree(test, cells)[0],
        "brute": lambda: index.exact(test)[0],
        "ivf": lambda: by_ivf(test, nprobe),
        "hnsw": lambda: by_hnsw(test, ef),
    }
    exact = index.exact(test)[0]
    recalls = {name: float((work() == exact).double().mean()) for name, work in sides.items()}
    turns = [{name: cpu_seconds(work) for name, work in sides.items()} for _ in range(asked.turns)]
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in sides}
    for name, probes in {"tree": cells, "brute": len(codes), "ivf": nprobe, "hnsw": ef}.items():
        print(f"{name}: {seconds[name]:.3f} CPU-s for {len(test)} vectors, {probes} probes, recall {recalls[name]:.4f}")
    ratios = {name: round(seconds[name] / seconds["tree"], 2) for name in GOALS}
    result = {
        "goal": 3,
        "ratio": ratios["brute"],
        "ratios": ratios,
        "quality": recalls["tree"],
        "recalls": recalls,
        "codes": len(codes),
        "width": width,
        "vectors": "features" if asked.features else "synthetic",
        "met": recalls["tree"] >= RECALL and all(ratios[name] >= goal for name, goal in GOALS.items()),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
