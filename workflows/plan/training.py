"""What a trained stage costs on N GPUs: states by ZeRO stage, activations, logits, traffic, steps, hours; what would fit.

P parameters that train, F that do not, N GPUs, V × H an output head. The engines keep parameters, gradients and moments in
float32 (bf16 is autocast), and ZeRO a float32 copy of its partition beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from smalti.schema import Train
from smalti.workflows.plan.base import Rates, size_text
from smalti.workflows.plan.models import Model
from smalti.workflows.plan.trace import PRECISIONS, Traced, recomputing, trace
from smalti.workflows.train.engines import accumulation, deepspeed_config

SINGLE, HALF = 4, 2  # bytes of a number
BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's reduce_bucket_size and stage3_max_live_parameters
HELD_BACK = 0.08  # of a GPU's memory, ASSUMED: CUDA's context, NCCL, fragmentation
STATES = {  # ZeRO stage: (bytes a parameter that every GPU holds, bytes a parameter shared out)
    0: (16, 0),  # parameters, gradients, two moments
    1: (8, 12),  # parameters, gradients | copy, two moments
    2: (4, 16),  # parameters | gradients, copy, two moments
    3: (0, 20),  # all: parameters, gradients, copy, two moments
}
OFFLOADED = {
    1: (8, 0),
    2: (4, 0),
    3: (0, 0),
}  # train.offload: what stays on the GPU; the rest lies in main memory or on NVMe
TRAFFIC = {  # ZeRO stage: float32 copies of P that a GPU receives and sends (a step, a micro batch)
    0: (2, 0),
    1: (2, 0),
    2: (1, 1),
    3: (0, 3),
}


def states(parameters: float, stage: int, num: int, *, offloaded: bool = False) -> float:
    """Bytes of parameters, gradients and optimizer on a GPU of `num`."""
    whole, shared = (OFFLOADED if offloaded and stage else STATES)[stage]
    return parameters * (whole + shared / num)


@dataclass(frozen=True)
class Setting:
    """What can be turned to make a stage fit."""

    num: int
    micro: int
    zero: int
    checkpointing: bool = False
    offload: bool = False


class Trial:
    """A model, traced once for one and once for two samples; memory of any `Setting` follows from them.

    fill: mean length of a sample as a share of the longest. Packed samples share rows; others take one each, and memory
    is that of the longest.
    """

    def __init__(self, model: Model, fill: float = 1.0) -> None:
        self.model, self.fill, self.bf16 = model, fill, model.train.precision == "bf16"
        self.traces = self._traces()

    def _step(self, num: int):
        return lambda backward, autocast: self.model.step(num, backward, autocast)

    def _traces(self) -> list[Traced]:
        return [trace(self.model.modules, self._step(num), bf16=self.bf16) for num in (1, 2)]

    @cached_property
    def checkpointed(self) -> list[Traced]:
        """The same with every block of the main engine computed again on the way back."""
        with recomputing(self.model.modules["model"]):
            return self._traces()

    def rows(self, micro: int) -> int:
        """Rows of a micro batch of so many samples."""
        return max(1, math.ceil(micro * self.fill - 1e-9)) if self.model.packed else micro

    def of(self, name: str, rows: int, checkpointing: bool) -> float:
        """A figure of `Traced` for a micro batch of so many rows: linear in them."""
        one, two = (getattr(traced, name) for traced in (self.checkpointed if checkpointing else self.traces))
        return one + (two - one) * (rows - 1)

    def flops(self, checkpointing: bool = False) -> dict[str, float]:
        """FLOPs of a row by precision, the head's among them."""
        one, two = (traced.flops for traced in (self.checkpointed if checkpointing else self.traces))
        found = {name: max(two[name] - one[name], 0.0) for name in PRECISIONS}
        head = self.model.head
        if head is not None:
            found["bf16" if self.bf16 else "fp32"] += 6.0 * head.length * head.rows * head.width
        return found

    def memory(self, setting: Setting) -> dict[str, float]:
        """Bytes on a GPU by what holds them."""
        model, train = self.model, self.model.train
        found = {"states": 0.0, "frozen": float(SINGLE * model.frozen)}
        for engine, stage in model.engines.items():
            own = setting.zero if engine == "model" else stage
            found["states"] += self.states(engine, own, setting.num, setting.offload)
        found["buffers"] = self._buffers(train, setting)
        found |= self._passing(setting)
        return found

    def states(self, engine: str, stage: int, num: int, offloaded: bool = False) -> float:
        """Bytes of an engine's parameters, gradients and moments on a GPU; Muon keeps one moment of its matrices."""
        whole = states(self.model.parameters(engine), stage, num, offloaded=offloaded)
        return whole - SINGLE * self.model.muon(engine)

    def _buffers(self, train: Train, setting: Setting) -> float:
        """ZeRO's: the bucket in which gradients are reduced, and under stage 3 the parameters gathered at once."""
        if setting.zero == 0:
            return 0.0
        zero = deepspeed_config(train, 1, zero_stage=setting.zero)["zero_optimization"]
        low = HALF if self.bf16 and setting.zero > 1 else SINGLE
        size = float(low * zero.get("reduce_bucket_size", BUCKET))
        if setting.zero == 3:
            live = min(self.model.parameters("model"), zero.get("stage3_max_live_parameters", MAX_LIVE))
            size += (HALF if self.bf16 else SINGLE) * max(live, self.model.largest)
        return size

    def _passing(self, setting: Setting) -> dict[str, float]:
        """Activations and logits at their worst moment: in the head's loss, or in the backward pass behind it. Under
        ZeRO-3 weights are gathered in bf16, and counted as such: autocast makes no copies."""
        rows, bare = self.rows(setting.micro), "bare_" if setting.zero == 3 else ""
        saved, peak = (self.of(f"{bare}{name}", rows, setting.checkpointing) for name in ("saved", "peak"))
        logits = self.logits(rows)
        return {"activations": max(saved, peak - logits), "logits": logits}

    def logits(self, rows: int) -> float:
        """The loss of the head: its weight's gradient, in bf16 its copy and a chunk's part too; a chunk of logits; the
        inputs' gradients."""
        head = self.model.head
        if head is None:
            return 0.0
        chunk = min(head.chunk, rows * head.length)
        weight = head.rows * head.width * (SINGLE + (2 * HALF if self.bf16 else 0))
        return float(weight + chunk * head.rows * (8 if self.bf16 else 4) + SINGLE * rows * head.length * head.width)


@dataclass(frozen=True)
class TrainPlan:
    """A trained stage on `num` GPUs."""

    trial: Trial
    rates: Rates
    num: int

    @property
    def model(self) -> Model:
        return self.trial.model

    @cached_property
    def setting(self) -> Setting:
        """As the recipe says. ConfigError: a batch that these GPUs cannot share."""
        train = self.model.train
        return Setting(
            self.num,
            accumulation(train, self.num)[0],
            train.zero_stage,
            train.activation_checkpointing,
            train.offload != "none",
        )

    def states(self, stage: int) -> float:
        """Bytes of all engines' states on a GPU, with the main one at this ZeRO stage."""
        engines = self.model.engines.items()
        return sum(
            self.trial.states(e, stage if e == "model" else own, self.num, self.setting.offload) for e, own in engines
        )

    @cached_property
    def memory(self) -> dict[str, float]:
        return self.trial.memory(self.setting)

    @property
    def room(self) -> float:
        """Bytes of a GPU that can be planned with."""
        return self.rates.memory * (1 - HELD_BACK)

    def fits(self, setting: Setting) -> bool:
        return sum(self.trial.memory(setting).values()) <= self.room

    @property
    def flops(self) -> float:
        """FLOPs of a step on all GPUs."""
        return sum(self.row_flops.values()) * self.model.train.batch_size * self.trial.fill

    @property
    def row_flops(self) -> dict[str, float]:
        """FLOPs of a row by precision, what is computed again among them."""
        return self.trial.flops(self.setting.checkpointing)

    @property
    def traffic(self) -> float:
        """Bytes that a GPU sends in a step, and receives."""
        if self.num == 1:
            return 0.0
        train, total = self.model.train, 0.0
        micros = train.batch_size // (self.num * self.setting.micro)
        for engine, own in self.model.engines.items():
            stage = self.setting.zero if engine == "model" else own
            once, each = TRAFFIC[stage]
            width = HALF if self.trial.bf16 and stage == 3 else SINGLE
            each += self.setting.checkpointing and stage == 3
            total += self.model.parameters(engine) * (SINGLE * once + width * each * micros)
        return total * (self.num - 1) / self.num

    @property
    def step_seconds(self) -> tuple[float, str]:
        """Seconds of a step, and what bounds them: traffic goes on beside the arithmetic."""
        share = self.model.train.batch_size / self.num * self.trial.fill
        compute = sum(share * count / self.rates.training(name) for name, count in self.row_flops.items())
        transfer = self.traffic / self.rates.wire(self.num)
        return max(compute, transfer), "arithmetic" if compute >= transfer else "traffic"

    @property
    def hours(self) -> float:
        return self.step_seconds[0] * self.model.train.steps / 3600

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint: parameters, and their copy and moments under ZeRO (without: the moments)."""
        train = self.model.train
        total = sum(self.model.parameters(engine) for engine in self.model.engines)
        return float(total * (16 if train.zero_stage else 12))

    def refusal(self) -> str | None:
        """Why it cannot fit, and what would make it fit; None when it fits."""
        total = sum(self.memory.values())
        if total <= self.room:
            return None
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in self.memory.items() if size)
        return (
            f"{self.model.name} needs {size_text(total)} on each {self.rates.device}, of {size_text(self.rates.memory)} "
            f"({size_text(self.room)} to plan with): {parts}. {self._mend()}"
        )

    def _mend(self) -> str:
        """The smallest change that fits: one alone, else several, else more GPUs."""
        key, now = self.model.section, self.setting
        smaller = [replace(now, micro=micro) for micro in _halves(now.micro)]
        shared = [replace(now, zero=stage) for stage in range(now.zero + 1, 4)]
        both = [replace(one, zero=3) for one in [now, *smaller]]
        away = [replace(one, offload=True) for one in both if self.model.train.optimizer != "muon"]
        checkpointed = [replace(one, checkpointing=True) for one in [now, *smaller, *shared, *both]]
        batch = self.model.train.batch_size
        more = [
            replace(one, num=self.num * times, micro=1)
            for times in (2, 4, 8, 16, 32)
            if batch % (self.num * times) == 0
            for one in (both[0], replace(both[0], checkpointing=True))
        ]
        found = next((one for one in [*smaller, *shared, *both, *checkpointed, *away, *more] if self.fits(one)), None)
        if found is None:
            return f"Nothing that is tried here makes it fit: not ZeRO-3 with {key}.micro_batch_size=1 either."
        changes = {
            f"{key}.optimizer=adamw": found.zero != now.zero and self.model.train.optimizer == "muon",
            f"{key}.zero_stage={found.zero}": found.zero != now.zero,
            f"{key}.micro_batch_size={found.micro}": found.micro != now.micro,
            f"{key}.activation_checkpointing=true": found.checkpointing and not now.checkpointing,
            f"{key}.offload=cpu": found.offload and not now.offload,
            f"--gpus {found.num}": found.num != now.num,
        }
        size = size_text(sum(self.trial.memory(found).values()))
        return f"With {' and '.join(text for text, changed in changes.items() if changed)} it is {size}, and fits."


def _halves(micro: int) -> list[int]:
    return [micro // 2**i for i in range(1, micro.bit_length()) if micro % 2**i == 0]


def lines(plan: TrainPlan, measured: Sequence[str] = ()) -> list[str]:
    """The plan as text, a line a figure, its formula beside it."""
    model, setting, train = plan.model, plan.setting, plan.model.train
    trained = {engine: model.parameters(engine) for engine in model.engines}
    head, total = model.head, sum(plan.memory.values())
    each = " · ".join(f"{stage}: {size_text(plan.states(stage))}" for stage in STATES)
    bound = plan.step_seconds[1]
    shares = " + ".join(f"{plan.row_flops[name]:.3g} {name}" for name in PRECISIONS if plan.row_flops[name])
    rows = [
        ("parameters", f"{_count(model.parameters())}, trained {_count(sum(trained.values()))}", "F + P"),
        ("states a GPU", f"ZeRO {each}", "0: 16·P; 1: 8·P + 12·P/N; 2: 4·P + 16·P/N; 3: 20·P/N"),
        ("", f"the recipe has ZeRO-{setting.zero}: {size_text(plan.memory['states'])}, frozen {size_text(plan.memory['frozen'])}{_away(plan)}", "4·F"),
        ("ZeRO's buffers", size_text(plan.memory["buffers"]), _buffer_formula(setting, plan.trial.bf16)),
        ("activations", f"{size_text(plan.memory['activations'])} of {plan.trial.rows(setting.micro)} {'rows' if model.packed else 'samples'}", "traced through the model's own step"),
    ]  # fmt: skip
    if head is not None:
        rows.append(
            ("logits", size_text(plan.memory["logits"]), f"V={head.rows:,}, H={head.width:,}: (4+4)·V·H + 8·chunk·V + 4·L·H")
        )  # fmt: skip
    rows += [
        ("memory a GPU", f"{size_text(total)} of {size_text(plan.room)}", f"{HELD_BACK:.0%} of {size_text(plan.rates.memory)} held back"),
        ("traffic a step", f"{size_text(plan.traffic)} a GPU each way", _traffic_formula(setting.zero, plan.trial.bf16)),
        ("steps", f"{train.steps:,} of {train.batch_size:,} samples", f"{train.batch_size // (plan.num * setting.micro)} micro batch(es) of {setting.micro} a GPU"),
        ("FLOPs a sample", shares, "counted in the trace" + (", the head 6·L·V·H" if head else "")),
        ("a checkpoint", size_text(plan.checkpoint), "16·P under ZeRO, else 12·P"),
        ("hours", f"{plan.hours:.3g}, {plan.hours * plan.num:.3g} GPU-hours", f"bound by {bound}"),
    ]  # fmt: skip
    found = [f"{model.name}: {model.what}"]
    found += [f"  {name:<15} {value:<58} {formula}".rstrip() for name, value, formula in rows]
    found += [f"  {'measured':<15} {text}" for text in measured]
    return found


def _away(plan: TrainPlan) -> str:
    """What `train.offload` puts into main memory, or on NVMe."""
    if not plan.setting.offload:
        return ""
    here = plan.memory["states"]
    whole = sum(plan.trial.states(engine, plan.setting.zero, plan.num) for engine in plan.model.engines)
    return f", offloaded {size_text(whole - here)} a worker"


def _buffer_formula(setting: Setting, bf16: bool) -> str:
    if setting.zero == 0:
        return "none without ZeRO"
    bucket = f"{HALF if bf16 and setting.zero > 1 else SINGLE}·{BUCKET:,} (reduce_bucket_size)"
    return bucket + (f" + {HALF if bf16 else SINGLE}·min(P, {MAX_LIVE:,}) gathered" if setting.zero == 3 else "")


def _traffic_formula(stage: int, bf16: bool) -> str:
    width = HALF if bf16 and stage == 3 else SINGLE
    each = {0: "2·4·P", 1: "2·4·P", 2: "4·P + 4·P a micro batch", 3: f"3·{width}·P a micro batch"}[stage]
    return f"({each})·(N − 1)/N"


def _count(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"
