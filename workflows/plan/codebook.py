"""The cost of the stage `codebook`: passes over N vectors of C numbers, for K codes in P cells (see `clustering`)."""

from __future__ import annotations

import math

from smalti.schema import CodebookSection
from smalti.workflows import clustering, code_sums, recall
from smalti.workflows.codebook import SAMPLE_A_CELL, SAMPLE_MIN, SEEDS_A_CODE
from smalti.workflows.plan.base import Phase, Plan, Rates

HALF, SINGLE, DOUBLE, INDEX = 2, 4, 8, 8  # bytes


def plan_codebook(section: CodebookSection, vectors: int, width: int, rates: Rates, num: int) -> Plan:
    """Phases and memory of k-means of `vectors` × `width` float16 features by `section`, on `num` devices.

    Cells are taken to be of one size; with shares in proportion to sizes the second level costs P·Σ(n_p/N)² times as
    much. The plan is not checked: see `Plan.check`.
    """
    two_level = section.coarse > 1
    phases = (_two_level if two_level else _flat)(section, vectors, width)
    cells, probes = section.coarse, min(clustering.PROBES, section.coarse)
    searched = cells + probes * section.size / cells if two_level else section.size
    flops = 2.0 * vectors * searched * width
    formula = f"2·N·(P + {probes}·K/P)·C" if two_level else "2·N·K·C"
    data = float(HALF * vectors * width)
    phases += [Phase(f"polish {step + 1}", formula, flops, data) for step in range(section.polish)]
    if two_level:
        drawn = recall.num_vectors(section.recall)
        phases.append(Phase("recall", f"2·{drawn:,}·K·C", 2.0 * drawn * section.size * width))
        seen = _cells_seen(section)
        formula, flops = f"2·N·(P + {seen:.1f}·K/P)·C", 2.0 * vectors * (cells + seen * section.size / cells) * width
    phases.append(Phase("scores", formula, flops, data))
    title = f"codebook: N = {vectors:,} vectors x C = {width:,} -> K = {section.size:,} codes in P = {cells:,} cells"
    return Plan(title, phases, _memory(section, vectors, width), rates, num)


def _cells_seen(section: CodebookSection) -> float:
    """Cells whose codes a vector is compared with at `codebook.recall`, ASSUMED: 4 at 0.99, twice as many for a tenth of
    the misses."""
    missed = max(1 - section.recall, 1e-9)
    return min(section.coarse, max(1.0, 4 * 2 ** math.log10(0.01 / missed)))


def _two_level(section: CodebookSection, vectors: int, width: int) -> list[Phase]:
    cells, turns, data = section.coarse, section.iterations, float(HALF * vectors * width)
    sample = _sample(section, vectors)
    tasks = -(-sample // clustering.SAMPLE_CHUNK_VECTORS)
    return [
        Phase("sample", "every shard is read once", read=data),
        Phase("cells", "2·S·P·C a Lloyd iteration", 2.0 * sample * cells * width * turns, devices=tasks),
        Phase("sorting", "2·N·P·C", 2.0 * vectors * cells * width, data, data),
        Phase("codes", "2·N·(K/P)·C a Lloyd iteration", 2.0 * vectors * section.size / cells * width * turns, data),
    ]


def _flat(section: CodebookSection, vectors: int, width: int) -> list[Phase]:
    data, flops = float(HALF * vectors * width), 2.0 * vectors * section.size * width
    lloyd = Phase("codes", "2·N·K·C a Lloyd iteration", flops * section.iterations, data * section.iterations)
    return [Phase("sample", "every shard is read once", read=data), lloyd]


def _sample(section: CodebookSection, vectors: int) -> int:
    if section.coarse > 1:
        wanted = max(section.sample or max(SAMPLE_MIN, SAMPLE_A_CELL * section.coarse), section.coarse)
    else:
        wanted = max(section.sample or SAMPLE_MIN, SEEDS_A_CODE * section.size)
    return min(wanted, vectors)


def _memory(section: CodebookSection, vectors: int, width: int) -> list[tuple[str, float, str, str]]:
    """(who, bytes, formula, mend) of the largest needs of the driver and of a task."""
    codes = float(SINGLE * section.size * width)
    moves = section.polish > 0 or section.coarse == 1
    summed = float(DOUBLE * width)
    ranges = summed * min(section.size, code_sums.RANGE_NUMBERS // width) if moves else 0.0
    met = summed * min(section.size, clustering.CHUNK_VECTORS) if moves else 0.0
    smaller = "Set a smaller codebook.size, or features of fewer numbers."
    needs = [
        ("the driver in a pass", codes + ranges, "4·K·C" + " and a range of sums" * moves, smaller),
        ("a task in a pass", codes + met, "4·K·C" + f" + 8·min(K, {clustering.CHUNK_VECTORS:,})·C" * moves, smaller),
        (
            "the driver in the sample",
            float(SINGLE * _sample(section, vectors) * width),
            "4·S·C",
            "Set codebook.sample lower.",
        ),
    ]
    if section.coarse > 1:
        cell = min(vectors / section.coarse, section.cell_vectors)
        size = cell * (SINGLE + HALF) * width + DOUBLE * section.size / section.coarse * width
        needs.append(
            (
                "a task in a cell",
                size,
                "(4 + 2)·(N/P)·C + 8·(K/P)·C",
                "Set codebook.coarse higher, or codebook.cell_vectors lower.",
            )
        )
    return needs
