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


def lines(plan: TrainPlan, measured: Sequence[str] = ()) -> list[str]:
    """The plan as text: one line per figure, with its formula."""
    model, setting, train = plan.model, plan.setting, plan.model.train
    trained = {engine: model.parameters(engine) for engine in model.engines}
    head, total = model.head, sum(plan.memory.values())
    each = " · ".join(f"{stage}: {size_text(plan.states(stage))}" for stage in STATES)
    bound = plan.step_seconds[1]
    shares = " + ".join(
        f"{plan.row_flops[name]:.3g} {name}" for name in PRECISIONS if plan.row_flops[name]
    )
    rows = [
        ("parameters", f"{_count(model.parameters())}, trained {_count(sum(trained.values()))}", "F + P"),
        ("states a GPU", f"ZeRO {each}", "0: 16·P; 1: 8·P + 12·P/N; 2: 4·P + 16·P/N; 3: 20·P/N"),
        ("", f"the recipe has ZeRO-{setting.zero}: {size_text(plan.memory['states'])}, frozen {size_text(plan.memory['frozen'])}{_away(plan)}", "4·F"),
        ("ZeRO's buffers", size_text(plan.memory["buffers"]), _buffer_formula(plan)),
        ("activations", f"{size_text(plan.memory['activations'])} of {plan.trial.rows(setting.micro)} {'rows' if model.packed else 'samples'}", "traced through the task's own step"),
    ]  # fmt: skip
    if head is not None:
        rows.append(
            ("logits", size_text(plan.memory["logits"]), f"{_sizes(head)}: {_head_formula(plan)}")
        )  # fmt: skip
    rows += [
        ("memory a GPU", f"{size_text(total)} of {size_text(plan.usable)}", f"{HELD_BACK:.0%} of {size_text(plan.rates.memory)} held back"),
        ("main memory", f"{size_text(sum(plan.host(setting).values()))} a worker{_of_host(plan)}", "data_gb (texts as much again), batches ahead, offload" if head else "data_gb, batches ahead, offload"),
        ("traffic a step", f"{size_text(plan.traffic)} a GPU each way", _traffic_formula(plan)),
        ("steps", f"{train.steps:,} of {train.batch_size:,} samples", f"{plan.micros} micro batch(es) of {setting.micro} per GPU"),
        (f"FLOPs a {'row' if model.packed else 'sample'}", shares, "counted in the trace"),
        ("a checkpoint", size_text(plan.checkpoint), "16·P under ZeRO, else 12·P"),
        ("time", f"{time_text(plan.hours)}, {plan.hours * plan.num:.3g} GPU-hours", f"bound by {bound}{_left_out(plan)}"),
    ]  # fmt: skip
    found = [f"{model.name}: {model.what}"]
    found += [f"  {name:<15} {value:<58} {formula}".rstrip() for name, value, formula in rows]
    found += [f"  {'measured':<15} {text}" for text in measured]
    return found


def _sizes(head: Head) -> str:
    beside = f" and {head.depths} classifiers of {head.codes:,}" if head.depths else ""
    return f"V={head.rows:,}{beside}, H={head.width:,}"


def _head_formula(plan: TrainPlan) -> str:
    bf16, head = plan.trial.bf16, plan.model.head
    trained = head is not None and head.trained
    part = f" + 2·min(V·H, {PART:,})" if bf16 and trained else ""
    return f"{4 * trained + 2 * bf16}·V·H{part} + {8 if bf16 else 4}·chunk·V + 4·L·H"


def _away(plan: TrainPlan) -> str:
    """What `train.offload` puts into main memory, or on NVMe."""
    if not plan.setting.offload:
        return ""
    where = "; the disk's room is not known" if plan.model.train.offload == "nvme" else ""
    return f", offloaded {size_text(plan.offloaded(plan.setting))} a worker{where}"


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
    bucket = f"({' + '.join(map(str, plan.trial.buckets(stage)))})·min(P, {REDUCE_BUCKET:,}) (reduce_bucket_size)"
    return bucket + (
        f" + 4·min(P + F, {STAGE_3['stage3_max_live_parameters']:,}) gathered" if stage == 3 else ""
    )


def _traffic_formula(plan: TrainPlan) -> str:
    stage, model = plan.setting.zero, plan.model
    held = model.parameters("model") + model.frozen_in("model")
    twice = held > STAGE_3["stage3_max_live_parameters"]
    each = {
        0: "2·4·P",
        1: "2·G + 4·P",
        2: "2·G a micro batch + 4·P",
        3: f"{'2 x weights less what stays' if twice else 'weights'} + G, a micro batch",
    }[stage]
    widths = "2 bytes a number of linear layers, 4 of others" if plan.trial.bf16 else "4·P"
    return f"({each})·(N − 1)/N" + (f"; gradients G: {widths}" if stage else "")


def _count(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"
