"""The plan of the stage codebook, by hand."""

from __future__ import annotations

import re

import pytest

from smalti.schema import CodebookSection
from smalti.workflows.plan.base import Rates
from smalti.workflows.plan.codebook import plan_codebook

RATES = Rates("box", flops=1e12, read=1e9, memory=16e9, origin="stated")
N, C = 150_000_000, 1152


def test_two_level_counts_passes_flops_and_bytes() -> None:
    """By hand, for 150M x 1152 in 1,000 cells with one polish: five readings of 345.6 GB and one
    writing.
    """
    section = CodebookSection(size=500_000, coarse=1_000, iterations=10, polish=1)
    plan = plan_codebook(section, N, C, RATES, 8)
    data = 150e6 * 1152 * 2
    assert sum(phase.read for phase in plan.phases) == 5 * data
    assert sum(phase.written for phase in plan.phases) == data
    work = {phase.name: phase.flops for phase in plan.phases}
    assert work["cells"] == 2 * 256_000 * 1_000 * 1152 * 10
    assert work["sorting"] == 2 * 150e6 * 1_000 * 1152
    assert work["codes"] == 2 * 150e6 * 500 * 1152 * 10
    assert work["polish 1"] == 2 * 150e6 * (1_000 + 4 * 500) * 1152
    assert work["scores"] == pytest.approx(work["polish 1"]), "4 cells at the recall of 0.99"
    assert work["recall"] == 2 * 4_096 * 500_000 * 1152
    (polish,) = (phase for phase in plan.phases if phase.name == "polish 1")
    assert polish.moved == 8 * 1152 * 5 * 500 * 1_000, "a piece a cell, the codes of five"
    drawn = plan_codebook(section.model_copy(update={"cell_vectors": 50_000}), N, C, RATES, 8)
    assert {phase.name: phase.flops for phase in drawn.phases}["codes"] == work["codes"] / 3, (
        "of 150,000 a cell"
    )
    exact = plan_codebook(section.model_copy(update={"recall": 0.999}), N, C, RATES, 8)
    work = {phase.name: phase.flops for phase in exact.phases}
    assert work["recall"] == 2 * 16_000 * 500_000 * 1152
    assert work["scores"] == pytest.approx(2 * 150e6 * (1_000 + 8 * 500) * 1152)
    flat = plan_codebook(CodebookSection(size=500_000, iterations=10), N, C, RATES, 8)
    assert flat.phases[1].flops == pytest.approx(10 * 173e15, rel=0.01), "173 PFLOP an iteration"
    assert flat.seconds > 300 * plan.seconds


def test_hours_fall_with_devices_where_work_is_shared() -> None:
    section = CodebookSection(size=500_000, coarse=1_000)
    one, eight = (plan_codebook(section, N, C, RATES, num) for num in (1, 8))
    for before, after in zip(one.phases, eight.phases, strict=True):
        ratio = before.seconds(RATES, 1)[0] / after.seconds(RATES, 8)[0]
        assert ratio == pytest.approx(1 if before.devices == 1 else 8)
    assert one.phases[0].seconds(RATES, 1) == (pytest.approx(345.6), "bytes")


def test_what_cannot_fit_is_refused_with_the_mend() -> None:
    small = Rates("box", 1e12, 1e9, 2e9, "stated")
    found = plan_codebook(
        CodebookSection(size=500_000, coarse=1_000, polish=1), N, C, small, 8
    ).refusal()
    assert re.search(
        r"the driver in a pass needs 2\.9 GB .* box has 2\.0 GB.*codebook\.size", found or ""
    )
    found = plan_codebook(CodebookSection(size=4_000, coarse=4), N, C, small, 8).refusal()
    assert re.search(r"a task in a cell needs .*codebook\.coarse higher", found or "")
    assert (
        plan_codebook(CodebookSection(size=4_000, coarse=1_000), N, C, small, 8).refusal() is None
    )
