"""What a trained stage costs on N GPUs: memory, traffic, time and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from smalti.workflows.plan import fixes
from smalti.workflows.plan.base import Rates
from smalti.workflows.plan.models import Model
from smalti.workflows.plan.trial import HALF, SINGLE, Setting, Trial
from smalti.workflows.train.engines import SENT_LOW, STAGE_3, accumulation

HELD_BACK = 0.08  # of a GPU's memory, ASSUMED: CUDA's context, NCCL, fragmentation
HOST_SHARE = 0.6  # of main memory, ASSUMED: Ray's object store takes 30 %, processes the rest
BATCHES = 5  # of a worker: two ready, one in preparation (as rows and as a batch), one in use
TOKEN = 64  # bytes per position in a batch of sequences: ids, labels, places, int64 each


@dataclass(frozen=True)
class TrainPlan:
    """A trained stage on `num` GPUs.

    Attributes:
        trial: its model, traced.
        rates: of the GPUs.
        num: GPUs.
        others: models whose batches the same GPUs must share.
    """

    trial: Trial
    rates: Rates
    num: int
    others: Sequence[Model] = ()

    @property
    def model(self) -> Model:
        """The stage's model."""
        return self.trial.model

    @cached_property
    def setting(self) -> Setting:
        """The recipe's setting.

        Raises:
            ConfigError: for a batch that these GPUs cannot share.
        """
        train = self.model.train
        return Setting(
            self.num,
            accumulation(train, self.num)[0],
            train.zero_stage,
            train.activation_checkpointing,
            train.offload != "none",
        )

    def states(self, stage: int) -> float:
        """Bytes per GPU of all engines' states, with the main one at this ZeRO stage."""
        engines = self.model.engines.items()
        return sum(
            self.trial.states(e, stage if e == "model" else own, self.num, self.setting.offload)
            for e, own in engines
        )

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes per GPU, by what holds them."""
        return self.trial.memory(self.setting)

    @property
    def usable(self) -> float:
        """Bytes of a GPU that can be planned with."""
        return self.rates.memory * (1 - HELD_BACK)

    @property
    def usable_host(self) -> float:
        """Bytes of main memory per GPU that can be planned with; 0 if unknown."""
        return self.rates.host * HOST_SHARE

    def fits(self, setting: Setting) -> bool:
        """Whether GPUs and main memory hold what a worker needs; the size of a disk is unknown."""
        if sum(self.trial.memory(setting).values()) > self.usable:
            return False
        return not self.rates.host or sum(self.host(setting).values()) <= self.usable_host

    def host(self, setting: Setting) -> dict[str, float]:
        """Bytes of main memory per worker at most, by what holds them.

        Shards (texts take as much again), batches prepared ahead, and what is offloaded there.
        """
        model = self.model
        row = 3 * model.pixels**2
        if model.head:
            row += TOKEN * model.head.length
        in_main_memory = setting.offload and model.train.offload != "nvme"
        return {
            "shards": model.train.data_gb * 1e9 * (2 if model.head else 1),
            "batches": BATCHES * model.train.batch_size / setting.num * row,
            "offload": self.offloaded(setting) if in_main_memory else 0.0,
        }

    def offloaded(self, setting: Setting) -> float:
        """Bytes per worker that `train.offload` puts into main memory, or on NVMe."""
        without = self.trial.memory(replace(setting, offload=False))
        with_it = self.trial.memory(replace(setting, offload=True))
        return sum(without[name] - with_it[name] for name in ("states", "frozen"))

    @property
    def flops(self) -> float:
        """FLOPs of a step on all GPUs."""
        return sum(self.row_flops.values()) * self.model.train.batch_size * self.trial.fill

    @property
    def row_flops(self) -> dict[str, float]:
        """FLOPs per row by precision, with those of recomputed activations."""
        return self.trial.flops(self.setting.checkpointing)

    @property
    def traffic(self) -> float:
        """Bytes that a GPU sends in a step, and receives."""
        if self.num == 1:
            return 0.0
        sent = 0.0
        for engine, stage in self.model.engines.items():
            sent += self._sent(engine, self.setting.zero if engine == "model" else stage)
        return sent * (self.num - 1) / self.num

    def _sent(self, engine: str, stage: int) -> float:
        """Bytes of one engine in a ring.

        Gradients that all GPUs sum count twice, those of which each GPU sums a part once; then
        weights.
        """
        model = self.model
        weights = float(SINGLE * model.parameters(engine))
        gradients = weights - HALF * model.sent_low(engine, trained=True)
        if stage == 0:
            return 2 * weights
        if stage < 3:
            return 2 * gradients * (self.micros if stage == 2 else 1) + weights
        held = model.parameters(engine) + model.frozen_in(engine)
        twice = 1 - min(held, STAGE_3["stage3_max_live_parameters"]) / held
        large, small = _gathered(model, engine)
        return (large * (1 + twice) + gradients) * self.micros + small

    @property
    def step_seconds(self) -> tuple[float, str]:
        """Seconds of a step, and what bounds them.

        Traffic overlaps with arithmetic, and calls of operators run ahead of it.
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
        """Micro batches per GPU in a step."""
        return self.model.train.batch_size // (self.num * self.setting.micro)

    @property
    def hours(self) -> float:
        """Hours of all steps."""
        return self.step_seconds[0] * self.model.train.steps / 3600

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint: parameters and moments, under ZeRO their float32 copy too."""
        model = self.model
        each = 16 if self.model.train.zero_stage else 12
        return float(
            sum(model.parameters(e) * each + SINGLE * model.frozen_in(e) for e in model.engines)
        )

    def refusal(self) -> str | None:
        """Why it cannot fit, and what would make it fit; None if it fits."""
        return None if self.fits(self.setting) else fixes.refusal(self)


def _gathered(model: Model, engine: str) -> tuple[float, float]:
    """Bytes of weights that ZeRO-3 gathers.

    Returns:
        Those gathered for each micro batch; the small ones, which it keeps whole and gathers once
        a step in float32.
    """
    low = set[int]()
    if model.train.precision == "bf16":
        layers = [module for module in model.modules[engine].modules() if type(module) in SENT_LOW]
        low = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    large = small = 0
    for parameter in model.modules[engine].parameters():
        if parameter.numel() <= STAGE_3["stage3_param_persistence_threshold"]:
            small += SINGLE * parameter.numel()
        else:
            large += (HALF if id(parameter) in low else SINGLE) * parameter.numel()
    return float(large), float(small)
