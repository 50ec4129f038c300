"""Phases with their work, devices with their rates, and the table that both give."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from smalti import shards
from smalti.errors import ConfigError
from smalti.tokenizers import kmeans
from smalti.workflows.cluster.gpu_specs import GPUS
from smalti.workflows.codebook.passes import Chunk

ASSUMED_FRACTION = 0.45  # of the float32 peak: k-means and tree search compute in float32
ASSUMED_READ = 1e9  # bytes per second and GPU from the store
ASSUMED_TRAINING = 0.40  # of the peaks in training
ASSUMED_CALL_S = 5e-6  # until an operator is started on a GPU: what bounds small models
GPUS_A_NODE = 8
MEASURE_S = 0.5


@dataclass(frozen=True)
class Rates:
    """What one device does per second.

    Attributes:
        device: its name.
        flops: FLOP/s of k-means and tree search.
        read: bytes per second from the store.
        memory: bytes of the device.
        origin: where the figures come from.
        peaks: FLOP/s of training by precision, if not `flops`.
        inside: bytes per second between devices of a node; 0 is not counted.
        network: bytes per second between nodes; 0 is not counted.
        call_s: seconds until an operator is started.
        host: bytes of main memory for each device; 0 is unknown.
        note: what to know before renting one.
    """

    device: str
    flops: float
    read: float
    memory: float
    origin: str
    peaks: Mapping[str, float] = field(default_factory=dict)
    inside: float = 0.0
    network: float = 0.0
    call_s: float = 0.0
    host: float = 0.0
    note: str = ""

    def training(self, precision: str) -> float:
        """FLOP/s of a training step in this precision."""
        return self.peaks.get(precision, self.flops)

    def wire(self, num: int) -> float:
        """Bytes per second of the slowest link in a ring of `num` devices."""
        rate = self.inside if num <= GPUS_A_NODE else self.network
        return rate or float("inf")


@dataclass(frozen=True)
class Phase:
    """A part of a stage.

    Attributes:
        name: of the phase.
        formula: of its FLOPs, or what it reads.
        flops: of all devices.
        read: bytes from the store.
        written: bytes to the store.
        devices: how many can share it; 0 is all.
        moved: bytes of sums that pass through Ray's object store.
    """

    name: str
    formula: str
    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0
    devices: int = 0
    moved: float = 0.0

    def seconds(self, rates: Rates, num: int) -> tuple[float, str]:
        """Seconds on `num` devices, and what bounds them: `FLOPs` or `bytes`, which overlap."""
        shared = min(num, self.devices) if self.devices else num
        compute = self.flops / (rates.flops * shared)
        transfer = (self.read + self.written + self.moved) / (rates.read * shared)
        return max(compute, transfer), "FLOPs" if compute >= transfer else "bytes"


class Need(NamedTuple):
    """Memory that a process needs.

    Attributes:
        who: the process, and when.
        size: bytes.
        formula: of the bytes.
        fix: how to need less.
    """

    who: str
    size: float
    formula: str
    fix: str


@dataclass(frozen=True)
class Plan:
    """The phases of a stage on `num` devices.

    Attributes:
        title: first line of the text.
        phases: in order.
        memory: the largest needs.
        rates: of the devices.
        num: devices.
    """

    title: str
    phases: Sequence[Phase]
    memory: Sequence[Need]
    rates: Rates
    num: int

    @property
    def seconds(self) -> float:
        """Seconds of all phases."""
        return sum(phase.seconds(self.rates, self.num)[0] for phase in self.phases)

    def refusal(self) -> str | None:
        """Why it cannot fit, and the fix; None if every process has enough memory."""
        rates = self.rates
        for who, size, formula, fix in self.memory:
            if size > rates.memory:
                return (
                    f"{self.title}: {who} needs {size / 1e9:,.1f} GB ({formula}), and "
                    f"{rates.device} has {rates.memory / 1e9:,.1f} GB. {fix}"
                )
        return None

    def lines(self) -> list[str]:
        """The plan as text."""
        columns = f"{'read':>10}{'written':>10}{'sums':>10}{'FLOPs':>10}{'hours':>9}"
        found = [self.title, "", f"  {'phase':<14}{columns}  bound by"]
        for phase in self.phases:
            seconds, bound = phase.seconds(self.rates, self.num)
            row = _row(phase.name, phase.read, phase.written, phase.moved, phase.flops, seconds)
            found.append(f"{row}  {bound}; {phase.formula}")
        total = _row(
            "total",
            sum(phase.read for phase in self.phases),
            sum(phase.written for phase in self.phases),
            sum(phase.moved for phase in self.phases),
            sum(phase.flops for phase in self.phases),
            self.seconds,
        )
        found += [total, ""]
        for need in self.memory:
            found.append(f"  memory of {need.who}: {size_text(need.size)} ({need.formula})")
        rates = self.rates
        found.append(
            f"  {self.num} x {rates.device}, each {rates.flops:.3g} FLOP/s and "
            f"{size_text(rates.read)}/s: {rates.origin}"
        )
        return found


def _row(name: str, read: float, written: float, moved: float, flops: float, seconds: float) -> str:
    """A row of a plan's table."""
    sizes = "".join(f"{size_text(size):>10}" for size in (read, written, moved))
    return f"  {name:<14}{sizes}{flops:>10.2g}{seconds / 3600:>9.3g}"


def size_text(size: float) -> str:
    """`346 GB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB" if size else "0"


def time_text(hours: float) -> str:
    """`3.5 hours`, `12 minutes`, `0.8 seconds`."""
    for unit, name in ((1, "hours"), (60, "minutes")):
        if hours * unit >= 1:
            return (
                f"{hours * unit:,.3g} {name}"
                if hours * unit < 1000
                else f"{hours * unit:,.0f} {name}"
            )
    return f"{hours * 3600:.2g} seconds"


def gpu_rates(name: str) -> Rates:
    """Assumed rates of a GPU.

    Raises:
        ConfigError: for a GPU that is not in the list.
    """
    name = name.lower()
    if name not in GPUS:
        raise ConfigError(
            f"--gpu {name} is not known; there are {', '.join(GPUS)} and cpu "
            "(measured on this machine)"
        )
    gpu = GPUS[name]
    origin = (
        f"ASSUMED, {ASSUMED_FRACTION:.0%} of the float32 peak {gpu.fp32 / 1e12:g} TFLOP/s "
        f"for k-means and {ASSUMED_READ / 1e9:g} GB/s of the store"
    )
    peaks = {key: ASSUMED_TRAINING * getattr(gpu, key) for key in ("bf16", "tf32", "fp32")}
    flops = ASSUMED_FRACTION * gpu.fp32
    links = (gpu.inside, gpu.network, ASSUMED_CALL_S, gpu.host)
    return Rates(name, flops, ASSUMED_READ, gpu.memory, origin, peaks, *links, note=gpu.note)


def cpu_rates(width: int) -> Rates:
    """Rates of one core of this machine, measured in about two seconds.

    FLOP/s of nearest-code search, bytes per second of a cached shard. CPU-seconds count, so that
    other work does not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flops = _search_rate(width)
        read = _read_rate(width)
    finally:
        torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (os.cpu_count() or 1)
    return Rates(
        "core of this machine", flops, read, memory, "measured now, one thread; shards read warm"
    )


def _search_rate(width: int, rows: int = 4096, codes: int = 1024) -> float:
    generator = torch.Generator().manual_seed(0)
    x_NC = torch.randn(rows, width, generator=generator)
    c_KC = torch.randn(codes, width, generator=generator)
    kmeans.assign(x_NC[:256], c_KC)
    started = time.process_time()
    calls = 0
    while time.process_time() - started < MEASURE_S:
        kmeans.assign(x_NC, c_KC)
        calls += 1
    return 2.0 * rows * codes * width * calls / (time.process_time() - started)


def _read_rate(width: int, rows: int = 16_384) -> float:
    x_NC = (
        np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32).astype(np.float16)
    )
    columns = [
        pa.array(["x"] * rows),
        pa.array(np.arange(rows, dtype=np.int32)),
        shards.list_column(x_NC),
    ]
    with tempfile.TemporaryDirectory() as folder:
        shards.write_shard(folder, "train/00000", pa.table(columns, shards.feature_schema(width)))
        chunk = Chunk(folder, (("train/00000", rows),), width)
        started = time.process_time()
        calls = 0
        while time.process_time() - started < MEASURE_S:
            list(chunk.vectors())
            calls += 1
        return x_NC.nbytes * calls / (time.process_time() - started)
