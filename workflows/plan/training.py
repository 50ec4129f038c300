"""What a trained stage costs on N GPUs: states by ZeRO stage, activations, logits, traffic, steps,
hours; what would fit.

P parameters that train, F that do not, N GPUs, V × H an output head. The engines keep parameters,
gradients and moments in float32 (bf16 is autocast), and ZeRO a float32 copy of its partition beside
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from smalti.mllm.losses import PART
from smalti.schema import Train
from smalti.workflows.plan.base import Rates, size_text
from smalti.workflows.plan.devices import cannot_share
from smalti.workflows.plan.models import Model
from smalti.workflows.plan.trace import PRECISIONS, Traced, recomputing, trace
from smalti.workflows.train.engines import SENT_LOW, STAGE_3, accumulation, deepspeed_config

SINGLE, HALF = 4, 2  # bytes of a number
HELD_BACK = 0.08  # of a GPU's memory, ASSUMED: CUDA's context, NCCL, fragmentation
HOST_SHARE = 0.6  # of main memory, ASSUMED for `train.offload`: Ray's object store takes 30 %, processes the rest
BATCHES = 5  # of a worker's share at once: two ready, one in the making (twice, as rows and as a batch), one in use
TOKEN = 64  # bytes of a position in a batch of sequences: ids, labels, places, int64 each
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
    """A model, traced once for one and once for two samples; memory of any `Setting` follows from
    them.

    fill: mean length of a sample as a share of the longest. Packed samples share rows; others take
    one each, and memory is that of the longest.
    """

    def __init__(self, model: Model, fill: float = 1.0) -> None:
        self.model, self.fill, self.bf16 = model, fill, model.train.precision == "bf16"
        self.traces = self._traces()

    def _traces(self) -> list[Traced]:
        return [
            trace(self.model.modules, self.model.step(num), bf16=self.bf16)
            for num in self.model.traced_sizes
        ]

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
        few, more = (
            getattr(traced, name)
            for traced in (self.checkpointed if checkpointing else self.traces)
        )
        first, second = self.model.traced_sizes
        return few + (more - few) / (second - first) * (rows - first)

    def flops(self, checkpointing: bool = False) -> dict[str, float]:
        """FLOPs of a row by precision, the head's among them."""
        few, more = (
            traced.flops for traced in (self.checkpointed if checkpointing else self.traces)
        )
        first, second = self.model.traced_sizes
        return {name: max(more[name] - few[name], 0.0) / (second - first) for name in PRECISIONS}

    def calls(self, checkpointing: bool = False) -> int:
        """Operators called in a micro batch, whatever its size."""
        return (self.checkpointed if checkpointing else self.traces)[0].calls

    def memory(self, setting: Setting) -> dict[str, float]:
        """Bytes on a GPU by what holds them."""
        model, train = self.model, self.model.train
        found = {"states": 0.0, "frozen": float(SINGLE * model.frozen)}
        for engine, stage in model.engines.items():
            own = setting.zero if engine == "model" else stage
            found["states"] += self.states(engine, own, setting.num, setting.offload)
            found["frozen"] += self.frozen_in(engine, own, setting)
        found["buffers"] = self._buffers(train, setting)
        found |= self._passing(setting)
        return found

    def frozen_in(self, engine: str, stage: int, setting: Setting) -> float:
        """Bytes on a GPU of an engine's weights that are not trained: ZeRO-3 shares them out, or
        away, too.
        """
        share = (0.0 if setting.offload else 1 / setting.num) if stage == 3 else 1.0
        return SINGLE * self.model.frozen_in(engine) * share

    def states(self, engine: str, stage: int, num: int, offloaded: bool = False) -> float:
        """Bytes of an engine's parameters, gradients and moments on a GPU; Muon, which runs without
        ZeRO alone, keeps one moment of its matrices.
        """
        whole = states(self.model.parameters(engine), stage, num, offloaded=offloaded)
        return whole if stage else whole - SINGLE * self.model.muon(engine)

    def _buffers(self, train: Train, setting: Setting) -> float:
        """ZeRO's: a bucket for each precision in which gradients are reduced, and under stage 3 the
        parameters gathered at once, which are sent in bf16 where they can be, and lie there in
        float32.
        """
        if setting.zero == 0:
            return 0.0
        trained = int(self.model.parameters("model"))
        here = train.model_copy(
            update={"offload": "none"}
        )  # changes no bucket, and nvme wants a GPU in sight
        zero = deepspeed_config(here, 1, zero_stage=setting.zero, trained=trained)[
            "zero_optimization"
        ]
        size = float(sum(self.buckets(setting.zero)) * zero["reduce_bucket_size"])
        if setting.zero == 3:
            held = self.model.parameters("model") + self.model.frozen_in("model")
            live = min(held, zero["stage3_max_live_parameters"])
            size += SINGLE * max(live, self.model.largest)
        return size

    def buckets(self, stage: int) -> list[int]:
        """Bytes of a number in each bucket: of gradients that are sent in bf16, and of the others."""
        trained, low = self.model.parameters("model"), self.model.sent_low("model", trained=True)
        return [HALF if stage == 3 else SINGLE] * (low > 0) + [SINGLE] * (trained > low)

    def _passing(self, setting: Setting) -> dict[str, float]:
        """Activations and logits at their worst moment: in the head's loss, or in the backward pass
        behind it.

        Under ZeRO-3 linear layers keep no bf16 copy of their weights (DeepSpeed's own `linear`).
        """
        rows, bare = self.rows(setting.micro), "bare_" if setting.zero == 3 else ""
        saved, peak = (
            self.of(f"{bare}{name}", rows, setting.checkpointing) for name in ("saved", "peak")
        )
        logits = self.logits(rows)
        return {"activations": max(saved, peak - logits), "logits": logits}

    def logits(self, rows: int) -> float:
        """The loss of the head: its weight's gradient where it is trained, in bf16 its copy and a
        part of a chunk's product too; a chunk of logits; the inputs' gradients.

        Of several heads the gradients of all, the rest of the largest.
        """
        head = self.model.head
        if head is None:
            return 0.0
        chunk = min(head.chunk, rows * head.length)
        largest = head.at_once * head.width
        weight = SINGLE * head.every * head.width * head.trained + HALF * largest * self.bf16
        weight += HALF * min(largest, PART) * (self.bf16 and head.trained)
        inputs = SINGLE * rows * head.length * head.width * (1 + head.depths)
        return float(weight + chunk * head.at_once * (8 if self.bf16 else 4) + inputs)


@dataclass(frozen=True)
class TrainPlan:
    """A trained stage on `num` GPUs. `others`: models whose batches the same GPUs must share."""

    trial: Trial
    rates: Rates
    num: int
    others: Sequence[Model] = ()

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
            self.trial.states(e, stage if e == "model" else own, self.num, self.setting.offload)
            for e, own in engines
        )

    @cached_property
    def memory(self) -> dict[str, float]:
        return self.trial.memory(self.setting)

    @property
    def room(self) -> float:
        """Bytes of a GPU that can be planned with."""
        return self.rates.memory * (1 - HELD_BACK)

    def fits(self, setting: Setting) -> bool:
        return sum(self.trial.memory(setting).values()) <= self.room and self.has_room_beside(
            setting
        )

    def has_room_beside(self, setting: Setting) -> bool:
        """Whether main memory holds what a worker puts there, where it is known; a disk's room is
        not.
        """
        return (
            not self.rates.host or sum(self.host(setting).values()) <= self.rates.host * HOST_SHARE
        )

    def host(self, setting: Setting) -> dict[str, float]:
        """Bytes of main memory a worker by what holds them, at most: shards (of texts as many
        again), batches that are made ahead, and what is offloaded there.
        """
        model = self.model
        share = model.train.batch_size / setting.num
        return {
            "shards": model.train.data_gb * 1e9 * (2 if model.head else 1),
            "batches": BATCHES
            * share
            * (3 * model.pixels**2 + (TOKEN * model.head.length if model.head else 0)),
            "offload": self.away(setting)
            if setting.offload and model.train.offload != "nvme"
            else 0.0,
        }

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
        stages = {
            engine: self.setting.zero if engine == "model" else own
            for engine, own in self.model.engines.items()
        }
        return (
            sum(self._sent(engine, stage, self.micros) for engine, stage in stages.items())
            * (self.num - 1)
            / self.num
        )

    def _sent(self, engine: str, stage: int, micros: int) -> float:
        """Bytes of one engine: gradients summed by all (twice their size), or parts of them by each
        (once), and weights.
        """
        model = self.model
        weights = float(SINGLE * model.parameters(engine))
        gradients = weights - HALF * model.sent_low(engine, trained=True)
        if stage == 0:
            return 2 * weights
        if stage < 3:
            return 2 * gradients * (micros if stage == 2 else 1) + weights
        held = model.parameters(engine) + model.frozen_in(engine)
        again = 1 - min(held, STAGE_3["stage3_max_live_parameters"]) / held
        weights, kept = _as_sent(model, engine)
        return (weights * (1 + again) + gradients) * micros + kept

    @property
    def step_seconds(self) -> tuple[float, str]:
        """Seconds of a step, and what bounds them: traffic goes on beside the arithmetic, and calls
        ahead of it.
        """
        share = self.model.train.batch_size / self.num * self.trial.fill
        compute = sum(
            share * count / self.rates.training(name) for name, count in self.row_flops.items()
        )
        calls = self.trial.calls(self.setting.checkpointing) * self.micros * self.rates.call_s
        bounds = {
            "arithmetic": compute,
            "traffic": self.traffic / self.rates.wire(self.num),
            "calls of operators": calls,
        }
        bound = max(bounds, key=bounds.__getitem__)
        return bounds[bound], bound

    @property
    def micros(self) -> int:
        """Micro batches of a GPU in a step."""
        return self.model.train.batch_size // (self.num * self.setting.micro)

    @property
    def hours(self) -> float:
        return self.step_seconds[0] * self.model.train.steps / 3600

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint: parameters, and their copy and moments under ZeRO (without: the
        moments); of those that are not trained themselves alone.
        """
        model, each = self.model, 16 if self.model.train.zero_stage else 12
        return float(
            sum(model.parameters(e) * each + SINGLE * model.frozen_in(e) for e in model.engines)
        )

    def refusal(self) -> str | None:
        """Why it cannot fit, and what would make it fit; None when it fits."""
        total = sum(self.memory.values())
        if self.fits(self.setting):
            return None
        if total <= self.room:
            return (
                f"{self.model.name} puts {size_text(sum(self.host(self.setting).values()))} into main memory for each "
                f"{self.rates.device} ({_parts(self.host(self.setting))}), of {size_text(self.rates.host)} ({HOST_SHARE:.0%} to "
                f"plan with, ASSUMED). {self._smaller_window() or self._fix()}"
            )
        return (
            f"{self.model.name} needs {size_text(total)} on each {self.rates.device}, of {size_text(self.rates.memory)} "
            f"({size_text(self.room)} to plan with): {_parts(self.memory)}. {self._fix()}"
        )

    def _smaller_window(self) -> str:
        """The `data_gb` with which main memory suffices, "" where none does (in tenths of a
        gigabyte).
        """
        parts = self.host(self.setting)
        spare = self.rates.host * HOST_SHARE - parts["batches"] - parts["offload"]
        tenths = math.floor(10 * self.model.train.data_gb * spare / parts["shards"])
        if tenths < 1:
            return ""
        return f"With {self.model.section}.data_gb={tenths / 10:g} it fits (a window that takes more is read again)."

    def _fix(self) -> str:
        """The smallest change that fits: one alone, else several, else more GPUs."""
        key, now = self.model.section, self.setting
        smaller = [replace(now, micro=micro) for micro in _divisors(now.micro)]
        shared = [replace(now, zero=stage) for stage in range(now.zero + 1, 4)]
        both = [replace(one, zero=3) for one in [now, *smaller]]
        away = [replace(one, offload=True) for one in both if self.model.train.optimizer != "muon"]
        checkpointed = [replace(one, checkpointing=True) for one in [now, *smaller, *shared, *both]]
        batch = self.model.train.batch_size
        more = [
            replace(one, num=self.num * times, micro=1)
            for times in (2, 4, 8, 16, 32)
            if batch % (self.num * times) == 0 and not cannot_share(self.others, self.num * times)
            for one in (both[0], replace(both[0], checkpointing=True))
        ]
        found = next(
            (
                one
                for one in [*smaller, *shared, *both, *checkpointed, *away, *more]
                if self.fits(one)
            ),
            None,
        )
        if found is None:
            return f"Nothing that is tried here makes it fit: not ZeRO-3 with {key}.micro_batch_size=1 either."
        changes = {
            f"{key}.optimizer=adamw": found.zero != now.zero
            and self.model.train.optimizer == "muon",
            f"{key}.zero_stage={found.zero}": found.zero != now.zero,
            f"{key}.micro_batch_size={found.micro}": found.micro != now.micro,
            f"{key}.activation_checkpointing=true": found.checkpointing and not now.checkpointing,
            f"{key}.offload=cpu": found.offload and not now.offload,
            f"--gpus {found.num}": found.num != now.num,
        }
        size = size_text(sum(self.trial.memory(found).values()))
        there = (
            f" (and {size_text(self.away(found))} of main memory for each)" if found.offload else ""
        )
        return f"With {' and '.join(text for text, changed in changes.items() if changed)} it is {size}{there}, and fits."

    def away(self, setting: Setting) -> float:
        """Bytes a worker that `train.offload` puts into main memory, or on NVMe."""
        here, rest = (
            self.trial.memory(replace(setting, offload=offload)) for offload in (False, True)
        )
        return sum(here[name] - rest[name] for name in ("states", "frozen"))


def _parts(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items() if size)


def _as_sent(model: Model, engine: str) -> tuple[float, float]:
    """Bytes of the weights that ZeRO-3 gathers for a micro batch, and of the small ones, which it
    keeps whole and gathers once a step, in float32.
    """
    modules = [module for module in model.modules[engine].modules() if type(module) in SENT_LOW]
    low = (
        {id(p) for module in modules for p in module.parameters(recurse=False)}
        if model.train.precision == "bf16"
        else ()
    )
    large = kept = 0
    for parameter in model.modules[engine].parameters():
        if parameter.numel() <= STAGE_3["stage3_param_persistence_threshold"]:
            kept += SINGLE * parameter.numel()
        else:
            large += (HALF if id(parameter) in low else SINGLE) * parameter.numel()
    return float(large), float(kept)


def _divisors(micro: int) -> list[int]:
    """Those of a micro batch that are smaller, the largest first: a GPU's share of the batch
    divides by each.
    """
    return [part for part in range(micro // 2, 0, -1) if micro % part == 0]
