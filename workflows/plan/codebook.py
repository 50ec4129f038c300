"""The cost of the stage `codebook`: k-means in passes over the features.

N vectors of C numbers, K codes in P cells, S vectors of a sample.
"""

from __future__ import annotations

import math

from smalti.schema import CodebookSection
from smalti.workflows.codebook import partial_sums, passes, recall
from smalti.workflows.codebook.build import FINE_VECTORS, SAMPLE_A_CELL, SAMPLE_MIN, SEEDS_A_CODE
from smalti.workflows.plan.base import Need, Phase, Plan, Rates

HALF, SINGLE, DOUBLE = 2, 4, 8  # bytes
ASSUMED_MET = 5
"""Codes that the vectors of some cells meet, by the codes of these cells; 3.3 to 5.2 were measured."""
BESIDE = 0.1e9  # bytes of the blocks in which the driver moves codes
NAMES = 160  # bytes of a code's name in the search for repeated codes


def plan_codebook(
    section: CodebookSection, vectors: int, width: int, rates: Rates, num: int
) -> Plan:
    """Phases and memory of k-means over float16 features.

    Cells are taken to be of one size; with shares in proportion to sizes the second level costs
    P·Σ(n_p/N)² times as much.

    Args:
        vectors: N.
        width: C.
        num: devices.
    """
    two_level = section.coarse > 1
    phases = (_two_level if two_level else _flat)(section, vectors, width)
    cells = section.coarse
    probes = min(passes.PROBES, section.coarse)
    searched = cells + probes * section.size / cells if two_level else section.size
    flops = 2.0 * vectors * searched * width
    formula = f"2·N·(P + {probes}·K/P)·C" if two_level else "2·N·K·C"
    data = float(HALF * vectors * width)
    sums = _sums(section, vectors, width)
    phases += [
        Phase(f"polish {step + 1}", formula, flops, data, moved=sums)
        for step in range(section.polish)
    ]
    if two_level:
        drawn = recall.num_vectors(section.recall)
        tasks = -(-drawn // recall.TASK_VECTORS)
        phases.append(
            Phase("recall", f"2·{drawn:,}·K·C", 2.0 * drawn * section.size * width, devices=tasks)
        )
        seen = cells_seen(section)
        formula = f"2·N·(P + {seen:.1f}·K/P)·C"
        flops = 2.0 * vectors * (cells + seen * section.size / cells) * width
    phases.append(Phase("scores", formula, flops, data))
    title = (
        f"codebook: N = {vectors:,} vectors x C = {width:,} -> "
        f"K = {section.size:,} codes in P = {cells:,} cells"
    )
    return Plan(title, phases, _memory(section, vectors, width), rates, num)


def cells_seen(section: CodebookSection) -> float:
    """Cells whose codes a vector is compared with at `codebook.recall`.

    ASSUMED: 4 at 0.99, twice as many for a tenth of the misses.
    """
    missed = max(1 - section.recall, 1e-9)
    return min(section.coarse, max(1.0, 4 * 2 ** math.log10(0.01 / missed)))


def _two_level(section: CodebookSection, vectors: int, width: int) -> list[Phase]:
    cells = section.coarse
    turns = section.iterations
    data = float(HALF * vectors * width)
    sample = _sample(section, vectors)
    tasks = -(-sample // passes.SAMPLE_CHUNK_VECTORS)
    seen = min(vectors, cells * section.cell_vectors)
    of_cells = "N" if seen == vectors else f"{seen:,}"
    return [
        Phase("sample", "every shard is read once", read=data),
        Phase(
            "cells",
            "2·S·P·C a Lloyd iteration",
            2.0 * sample * cells * width * turns,
            devices=tasks,
        ),
        Phase("sorting", "2·N·P·C", 2.0 * vectors * cells * width, data, data),
        Phase(
            "codes",
            f"2·{of_cells}·(K/P)·C a Lloyd iteration",
            2.0 * seen * section.size / cells * width * turns,
            data,
        ),
    ]


def _sums(section: CodebookSection, vectors: int, width: int) -> float:
    """Bytes of the sums that the tasks of a Lloyd pass return.

    One row of float64 per code that a chunk, or a group of cells, meets.
    """
    num = section.size
    chunk = min(vectors, passes.CHUNK_VECTORS)
    met = num * -math.expm1(-chunk / num)  # of equally frequent codes
    tasks = -(-vectors // chunk)
    if section.coarse > 1:
        cell = vectors / section.coarse
        together = max(1, chunk // max(1, round(cell)))  # cells read together
        met = min(met, ASSUMED_MET * together * num / section.coarse)
        tasks = max(section.coarse // together, math.ceil(vectors / chunk))
    return float(DOUBLE * width * met * tasks)


def _flat(section: CodebookSection, vectors: int, width: int) -> list[Phase]:
    data = float(HALF * vectors * width)
    flops = 2.0 * vectors * section.size * width
    turns = section.iterations
    sums = _sums(section, vectors, width)
    lloyd = Phase(
        "codes", "2·N·K·C a Lloyd iteration", flops * turns, data * turns, moved=sums * turns
    )
    return [Phase("sample", "every shard is read once", read=data), lloyd]


def _sample(section: CodebookSection, vectors: int) -> int:
    if section.coarse > 1:
        wanted = max(
            section.sample or max(SAMPLE_MIN, SAMPLE_A_CELL * section.coarse), section.coarse
        )
    else:
        wanted = max(section.sample or SAMPLE_MIN, SEEDS_A_CODE * section.size)
    return min(wanted, vectors)


def _memory(section: CodebookSection, vectors: int, width: int) -> list[Need]:
    """The largest needs of the driver and of a task, without what Python and torch take."""
    seeds = section.coarse if section.coarse > 1 else section.size
    sample = Need(
        "the driver in the sample",
        float(SINGLE * (_sample(section, vectors) + seeds) * width),
        "4·(S + seeds)·C",
        "Set codebook.sample lower.",
    )
    needs = [*_pass_needs(section, vectors, width), sample]
    return needs + _cell_needs(section, vectors, width) if section.coarse > 1 else needs


def _pass_needs(section: CodebookSection, vectors: int, width: int) -> list[Need]:
    """Needs of a pass over all vectors, which may sum those of each code."""
    chunk = min(vectors, passes.CHUNK_VECTORS)
    codes = float(SINGLE * section.size * width)
    rows = met = 0  # of sums: held by the driver, met by a task
    if section.polish or section.coarse == 1:
        rows = min(section.size, max(1, partial_sums.RANGE_NUMBERS // width))
        met = min(section.size, chunk)
    far = float(3 * SINGLE * passes.FAR_KEPT * width)
    driver = codes + max(float(DOUBLE * rows * width) + far, float(NAMES * section.size)) + BESIDE
    task = codes + _read(vectors, width) + float(DOUBLE * (met + rows) * width)
    range_text = " and a range of sums" if rows else ""
    sums_text = f" + 8·({met:,} + {rows:,})·C" if rows else ""
    far_text = f" and 12·{passes.FAR_KEPT:,}·C of far vectors and 0.1 GB"
    block = min(vectors, passes.BLOCK_VECTORS)
    task_text = f"4·K·C + 2·{chunk:,}·C + 8·{block:,}·C{sums_text}"
    fix = "Set a smaller codebook.size, or features of fewer numbers."
    return [
        Need("the driver in a pass", driver, f"4·K·C{range_text}{far_text}", fix),
        Need("a task in a pass", task, task_text, fix),
    ]


def _cell_needs(section: CodebookSection, vectors: int, width: int) -> list[Need]:
    """Needs of the second level: sorting vectors into cells, and k-means in cells."""
    chunk = min(vectors, passes.CHUNK_VECTORS)
    block = min(vectors, passes.BLOCK_VECTORS)
    whole = vectors / section.coarse
    cell = min(whole, section.cell_vectors)
    together = max(1.0, FINE_VECTORS // whole) * cell * (2 if section.spherical else 1)
    sorting = Need(
        "a task in the sorting",
        _read(vectors, width) + HALF * chunk * width,
        f"(2 + 2)·{chunk:,}·C + 8·{block:,}·C",
        "Use smaller shards.",
    )
    codes = Need(
        "a task in a cell",
        SINGLE * together * width + DOUBLE * section.size / section.coarse * width,
        "4·n·C + 8·(K/P)·C, n vectors of cells read together",
        "Set codebook.coarse higher, or codebook.cell_vectors lower.",
    )
    return [sorting, codes]


def _read(vectors: int, width: int) -> float:
    """Bytes of shards, no larger than a chunk, and of two blocks: one in use, and the next."""
    chunk = min(vectors, passes.CHUNK_VECTORS)
    block = min(vectors, passes.BLOCK_VECTORS)
    return float((HALF * chunk + 2 * SINGLE * block) * width)
