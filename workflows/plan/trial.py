"""Memory of one trained model under any setting, from traces of two micro batches.

P trained parameters, F frozen ones, N GPUs, V × H an output head. The engines keep parameters,
gradients and moments in float32 (bf16 is autocast), and ZeRO a float32 copy of its partition beside
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from smalti.mllm.losses import PART
from smalti.schema import Train
from smalti.workflows.plan.models import Model
from smalti.workflows.plan.trace import PRECISIONS, Traced, recomputing, trace
from smalti.workflows.train.engines import deepspeed_config

SINGLE, HALF = 4, 2  # bytes of a number
STATES = {  # ZeRO stage: bytes per parameter that every GPU holds, and that all GPUs share
    0: (16, 0),  # parameters, gradients, two moments
    1: (8, 12),  # parameters, gradients | copy, two moments
    2: (4, 16),  # parameters | gradients, copy, two moments
    3: (0, 20),  # all: parameters, gradients, copy, two moments
}
OFFLOADED = {1: (8, 0), 2: (4, 0), 3: (0, 0)}
"""`STATES` with `train.offload`: the rest is in main memory or on NVMe."""


def states(parameters: float, stage: int, num: int, *, offloaded: bool = False) -> float:
    """Bytes of parameters, gradients and optimizer on each of `num` GPUs."""
    whole, shared = (OFFLOADED if offloaded and stage else STATES)[stage]
    return parameters * (whole + shared / num)


@dataclass(frozen=True)
class Setting:
    """What can be changed to make a stage fit.

    Attributes:
        num: GPUs.
        micro: samples of a micro batch.
        zero: ZeRO stage of the main engine.
        checkpointing: recompute activations.
        offload: optimizer states, and parameters under ZeRO-3, are not on the GPU.
    """

    num: int
    micro: int
    zero: int
    checkpointing: bool = False
    offload: bool = False


class Trial:
    """A model with two traced micro batches, from which the memory of any `Setting` follows.

    Args:
        fill: mean length of a sample as a share of the longest. Packed samples share rows; others
            take one each, and memory is that of the longest.
    """

    def __init__(self, model: Model, fill: float = 1.0) -> None:
        self.model = model
        self.fill = fill
        self.bf16 = model.train.precision == "bf16"
        self.traces = self._traces()

    def _traces(self) -> list[Traced]:
        return [
            trace(self.model.modules, self.model.step(num), bf16=self.bf16)
            for num in self.model.traced_sizes
        ]

    @cached_property
    def checkpointed(self) -> list[Traced]:
        """The same traces with every block of the main engine recomputed in the backward pass."""
        with recomputing(self.model.modules["model"]):
            return self._traces()

    def rows(self, micro: int) -> int:
        """Rows of a micro batch of `micro` samples."""
        return max(1, math.ceil(micro * self.fill - 1e-9)) if self.model.packed else micro

    def _at(self, checkpointing: bool) -> list[Traced]:
        return self.checkpointed if checkpointing else self.traces

    def of(self, name: str, rows: int, checkpointing: bool) -> float:
        """A figure of `Traced` for a micro batch of `rows`, in which it is linear."""
        few, more = (getattr(traced, name) for traced in self._at(checkpointing))
        first, second = self.model.traced_sizes
        return few + (more - few) / (second - first) * (rows - first)

    def flops(self, checkpointing: bool = False) -> dict[str, float]:
        """FLOPs per row, by precision."""
        few, more = (traced.flops for traced in self._at(checkpointing))
        first, second = self.model.traced_sizes
        return {name: max(more[name] - few[name], 0.0) / (second - first) for name in PRECISIONS}

    def calls(self, checkpointing: bool = False) -> int:
        """Operators called in a micro batch; larger ones call about as many."""
        return self._at(checkpointing)[0].calls

    def memory(self, setting: Setting) -> dict[str, float]:
        """Bytes per GPU, by what holds them."""
        model = self.model
        train = self.model.train
        found = {"states": 0.0, "frozen": float(SINGLE * model.frozen)}
        for engine, stage in model.engines.items():
            own = setting.zero if engine == "model" else stage
            found["states"] += self.states(engine, own, setting.num, setting.offload)
            found["frozen"] += self.frozen_in(engine, own, setting)
        found["buffers"] = self._buffers(train, setting)
        found |= self._passing(setting)
        return found

    def frozen_in(self, engine: str, stage: int, setting: Setting) -> float:
        """Bytes per GPU of an engine's frozen weights, which ZeRO-3 partitions or offloads too."""
        share = (0.0 if setting.offload else 1 / setting.num) if stage == 3 else 1.0
        return SINGLE * self.model.frozen_in(engine) * share

    def states(self, engine: str, stage: int, num: int, offloaded: bool = False) -> float:
        """Bytes per GPU of an engine's parameters, gradients and moments.

        Muon keeps one moment of its matrices; it runs without ZeRO only.
        """
        whole = states(self.model.parameters(engine), stage, num, offloaded=offloaded)
        return whole if stage else whole - SINGLE * self.model.muon(engine)

    def _buffers(self, train: Train, setting: Setting) -> float:
        """Bytes of ZeRO's buffers.

        A bucket for each precision in which gradients are reduced; under stage 3 also the
        parameters gathered at once, which are held in float32 even if they are sent in bf16.
        """
        if setting.zero == 0:
            return 0.0
        trained = int(self.model.parameters("model"))
        # offload changes no bucket, and DeepSpeed's config of nvme needs a GPU
        plain = train.model_copy(update={"offload": "none"})
        config = deepspeed_config(plain, 1, zero_stage=setting.zero, trained=trained)
        zero = config["zero_optimization"]
        size = float(sum(self.buckets(setting.zero)) * zero["reduce_bucket_size"])
        if setting.zero == 3:
            held = self.model.parameters("model") + self.model.frozen_in("model")
            live = min(held, zero["stage3_max_live_parameters"])
            size += SINGLE * max(live, self.model.largest)
        return size

    def buckets(self, stage: int) -> list[int]:
        """Bytes per number of each bucket: of gradients sent in bf16, and of the others."""
        trained = self.model.parameters("model")
        low = self.model.sent_low("model", trained=True)
        return [HALF if stage == 3 else SINGLE] * (low > 0) + [SINGLE] * (trained > low)

    def _passing(self, setting: Setting) -> dict[str, float]:
        """Activations and logits at most: in the head's loss, or in the backward pass after it.

        Under ZeRO-3 linear layers keep no bf16 copy of their weights (DeepSpeed's own `linear`).
        """
        rows = self.rows(setting.micro)
        bare = "bare_" if setting.zero == 3 else ""
        saved = self.of(f"{bare}saved", rows, setting.checkpointing)
        peak = self.of(f"{bare}peak", rows, setting.checkpointing)
        logits = self.logits(rows)
        return {"activations": max(saved, peak - logits), "logits": logits}

    def logits(self, rows: int) -> float:
        """Bytes that the head's loss holds.

        The gradient of its weight if it is trained; in bf16 a copy of the weight and a part of a
        chunk's product; a chunk of logits; the gradients of its inputs. Of several heads the
        gradients of all, and the rest of the largest.
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
