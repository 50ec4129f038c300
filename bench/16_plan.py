"""Goal 16: memory and time that a training step of small models really takes on one core, against
`smalti plan`.

The models are those of the quickstart at batch 8. Memory: bytes that stay and the peak of a further
micro batch, by torch's own record of its allocator. Time: CPU-seconds of a micro batch against the
plan's FLOPs at the rate of a core, measured in the same run (matrix products as nearest-code search
has them). The goal is memory within 15 %; the ratio of times is what `smalti plan` prints beside
its hours.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.machine import report
from bench.real_steps import measure
from smalti.config import load_recipe
from smalti.workflows.plan.base import cpu_rates
from smalti.workflows.plan.measured import GOAL
from smalti.workflows.plan.trial import Setting, Trial
from smalti.workflows.systems.registry import system_of

BATCH, TURNS, WITHIN = 8, 3, 0.15


def main() -> None:
    torch.set_num_threads(1)
    recipe = load_recipe("semhitok-quickstart", [])
    rates = cpu_rates(1152)
    trials = {model.name: Trial(model) for model in system_of(recipe).planned_models(recipe)}
    stages = {}
    for name, real in measure(recipe, BATCH, TURNS).items():
        planned = trials[name].memory(Setting(1, BATCH, 0))
        memory = (real.stays + real.passing) / sum(planned.values())
        seconds = real.seconds / (sum(trials[name].flops().values()) * BATCH / rates.flops)
        stages[name] = {"memory": round(memory, 3), "seconds": round(seconds, 2)}
        print(f"{name:<10} memory {memory:.3f} and time {seconds:.2f} times the plan")
    worst = max(abs(ratios["memory"] - 1) for ratios in stages.values())
    report(GOAL, ratio=1 + worst, stages=stages, quality=1.0, met=worst <= WITHIN)


if __name__ == "__main__":
    main()
