"""The plan of a trained stage as text."""

from __future__ import annotations

from collections.abc import Sequence

from smalti.mllm.losses import PART
from smalti.workflows.plan.base import size_text, time_text
from smalti.workflows.plan.models import Head
from smalti.workflows.plan.trace import PRECISIONS
from smalti.workflows.plan.training import HELD_BACK, TrainPlan
from smalti.workflows.plan.trial import STATES
from smalti.workflows.train.engines import REDUCE_BUCKET, STAGE_3

STATES_FORMULA = "0: 16·P; 1: 8·P + 12·P/N; 2: 4·P + 16·P/N; 3: 20·P/N"
Row = tuple[str, str, str]
"""A figure's name, its value, and its formula."""


def lines(plan: TrainPlan, measured: Sequence[str] = ()) -> list[str]:
    """The plan as text: one line per figure, with its formula."""
    rows = [*_memory_rows(plan), *_step_rows(plan)]
    found = [f"{plan.model.name}: {plan.model.what}"]
    found += [f"  {name:<16} {value:<58} {formula}".rstrip() for name, value, formula in rows]
    return found + [f"  {'measured':<16} {text}" for text in measured]


def _memory_rows(plan: TrainPlan) -> list[Row]:
    model = plan.model
    setting = plan.setting
    memory = plan.memory
    trained = sum(model.parameters(engine) for engine in model.engines)
    each = " · ".join(f"{stage}: {size_text(plan.states(stage))}" for stage in STATES)
    states = size_text(memory["states"])
    frozen = size_text(memory["frozen"])
    own = f"the recipe has ZeRO-{setting.zero}: {states}, frozen {frozen}{_offloaded(plan)}"
    samples = f"{plan.trial.rows(setting.micro)} {'rows' if model.packed else 'samples'}"
    activations = f"{size_text(memory['activations'])} of {samples}"
    rows = [
        ("parameters", f"{_count(model.parameters())}, trained {_count(trained)}", "F + P"),
        ("states per GPU", f"ZeRO {each}", STATES_FORMULA),
        ("", own, "4·F"),
        ("ZeRO's buffers", size_text(memory["buffers"]), _buffer_formula(plan)),
        ("activations", activations, "traced through the task's own step"),
    ]
    if model.head:
        formula = f"{_sizes(model.head)}: {_head_formula(plan)}"
        rows.append(("logits", size_text(memory["logits"]), formula))
    total = f"{size_text(sum(memory.values()))} of {size_text(plan.usable)}"
    held_back = f"{HELD_BACK:.0%} of {size_text(plan.rates.memory)} held back"
    host = f"{size_text(sum(plan.host(setting).values()))} per worker{_of_host(plan)}"
    shards = "data_gb (texts as much again)" if model.head else "data_gb"
    return [
        *rows,
        ("memory per GPU", total, held_back),
        ("main memory", host, f"{shards}, batches ahead, offload"),
    ]


def _step_rows(plan: TrainPlan) -> list[Row]:
    model = plan.model
    train = plan.model.train
    flops = plan.row_flops
    shares = " + ".join(f"{flops[name]:.3g} {name}" for name in PRECISIONS if flops[name])
    micros = f"{plan.micros} micro batch(es) of {plan.setting.micro} per GPU"
    hours = f"{time_text(plan.hours)}, {plan.hours * plan.num:.3g} GPU-hours"
    return [
        ("traffic per step", f"{size_text(plan.traffic)} per GPU each way", _traffic_formula(plan)),
        ("steps", f"{train.steps:,} of {train.batch_size:,} samples", micros),
        (f"FLOPs per {'row' if model.packed else 'sample'}", shares, "counted in the trace"),
        ("checkpoint", size_text(plan.checkpoint), "16·P under ZeRO, else 12·P"),
        ("time", hours, f"bound by {plan.step_seconds[1]}{_left_out(plan)}"),
    ]


def _sizes(head: Head) -> str:
    beside = f" and {head.depths} classifiers of {head.codes:,}" if head.depths else ""
    return f"V={head.rows:,}{beside}, H={head.width:,}"


def _head_formula(plan: TrainPlan) -> str:
    bf16 = plan.trial.bf16
    head = plan.model.head
    trained = head is not None and head.trained
    part = f" + 2·min(V·H, {PART:,})" if bf16 and trained else ""
    return f"{4 * trained + 2 * bf16}·V·H{part} + {8 if bf16 else 4}·chunk·V + 4·L·H"


def _offloaded(plan: TrainPlan) -> str:
    """What `train.offload` puts into main memory, or on NVMe."""
    if not plan.setting.offload:
        return ""
    where = "; the disk's size is unknown" if plan.model.train.offload == "nvme" else ""
    return f", offloaded {size_text(plan.offloaded(plan.setting))} per worker{where}"


def _of_host(plan: TrainPlan) -> str:
    return f" at most, of {size_text(plan.rates.host)}" if plan.rates.host else " at most"


def _left_out(plan: TrainPlan) -> str:
    return (
        "; the way to main memory and the optimizer there left out" if plan.setting.offload else ""
    )


def _buffer_formula(plan: TrainPlan) -> str:
    stage = plan.setting.zero
    if stage == 0:
        return "none without ZeRO"
    each = " + ".join(map(str, plan.trial.buckets(stage)))
    bucket = f"({each})·min(P, {REDUCE_BUCKET:,}) (reduce_bucket_size)"
    if stage < 3:
        return bucket
    return f"{bucket} + 4·min(P + F, {STAGE_3['stage3_max_live_parameters']:,}) gathered"


def _traffic_formula(plan: TrainPlan) -> str:
    stage = plan.setting.zero
    model = plan.model
    held = model.parameters("model") + model.frozen_in("model")
    twice = held > STAGE_3["stage3_max_live_parameters"]
    each = {
        0: "2·4·P",
        1: "2·G + 4·P",
        2: "2·G per micro batch + 4·P",
        3: f"{'2 x weights less what stays' if twice else 'weights'} + G, per micro batch",
    }[stage]
    widths = "2 bytes a number of linear layers, 4 of others" if plan.trial.bf16 else "4·P"
    return f"({each})·(N − 1)/N" + (f"; gradients G: {widths}" if stage else "")


def _count(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"
