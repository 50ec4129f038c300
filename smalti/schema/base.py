"""What every section of a recipe shares: strict values, and how one model is trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]


RUN_ONLY: dict[str, JsonValue] = {"result": False}
"""Mark of a key that changes no result: how often is logged, what is kept, how work is divided.

Fingerprints ignore it.
"""
IF_SET: dict[str, JsonValue] = {"result": "if_set"}
"""Mark of a key that fingerprints ignore at its default: it came after results were fingerprinted
without it.
"""
LATE: dict[str, JsonValue] = {"result": "late"}
"""As `IF_SET`, and dumps leave it out at its default too."""


def run_only_below(*names: str) -> dict[str, JsonValue]:
    """Mark of a section some of whose keys change no result there."""
    return {"run_only_below": list(names)}


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion (an int may stand for a
    float).

    Whether a key changes results is marked at the key: `json_schema_extra=RUN_ONLY`, `IF_SET` or
    `LATE`; without a mark it does. `result_settings` reads the marks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_late(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped = handler(self)
        for name, field in type(self).model_fields.items():
            if _mark(field, "result") == "late" and _is_default(self, name):
                dumped.pop(name, None)
        return dumped


def result_settings(section: Section, exclude: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a section that a stage's result depends on, as JSON: what its fingerprint is
    made of.

    Args:
        exclude: keys that the caller handles itself.
    """
    settings = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        mark = _mark(field, "result")
        if (
            name in exclude
            or mark is False
            or (mark in ("if_set", "late") and _is_default(section, name))
        ):
            settings.pop(name, None)
            continue
        value = getattr(section, name)
        if isinstance(value, Section):
            settings[name] = result_settings(value, _mark(field, "run_only_below") or ())
        elif isinstance(value, list | tuple):
            settings[name] = [
                result_settings(item) if isinstance(item, Section) else dumped
                for item, dumped in zip(value, settings[name], strict=True)
            ]
    return settings


def _mark(field: FieldInfo, name: str) -> Any:
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def _is_default(section: Section, name: str) -> bool:
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(section, name) == default)


class Train(Section):
    """How one model is trained; the same keys for every training stage."""

    steps: Positive = Field(1000, description="optimizer steps")
    batch_size: Positive = Field(
        64, description="samples per step, over all workers and accumulation steps"
    )
    micro_batch_size: Positive | None = Field(
        None, description="samples per worker and forward pass; default: no gradient accumulation"
    )
    lr: Rate = Field(1e-4, description="peak learning rate")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw; or muon for the weights of linear layers, AdamW for the rest (not under ZeRO)",
    )
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.95), strict=False, description="AdamW's β1 and β2"
    )
    weight_decay: Weight = Field(0.0, description="decoupled weight decay; 0 is off")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warmup: cosine decay to min_lr, or constant"
    )
    warmup: Weight = Field(
        0.03, description="linear warmup: below 1 a fraction of the steps, else a number of steps"
    )
    min_lr: Fraction = Field(
        0.0, description="learning rate at the end of the cosine, as a fraction of lr"
    )
    clip: Weight = Field(1.0, description="largest gradient norm; 0 is off")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        0,
        description="DeepSpeed ZeRO: 0 off; 1 partitions optimizer states, 2 gradients too, 3 weights too",
        json_schema_extra=RUN_ONLY,
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="fp32, or bf16: bfloat16 autocast with float32 weights"
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where ZeRO keeps optimizer states, and under ZeRO-3 weights: none: the device; cpu: main memory; nvme: a disk",
        json_schema_extra=RUN_ONLY,
    )
    offload_path: str | None = Field(
        None,
        description="offload: nvme: a folder on the local NVMe disk of each node",
        json_schema_extra=RUN_ONLY,
    )
    activation_checkpointing: bool = Field(
        False,
        description="recompute the activations of each block in the backward pass: less memory, more time",
        json_schema_extra=RUN_ONLY,
    )
    compile: bool = Field(
        False,
        description="torch.compile of each transformer block (needs a C++ compiler)",
        json_schema_extra=RUN_ONLY,
    )
    checkpoint_every: Positive = Field(
        500, description="steps between checkpoints", json_schema_extra=RUN_ONLY
    )
    keep: Positive = Field(
        2, description="newest complete checkpoints to keep", json_schema_extra=RUN_ONLY
    )
    best: str | None = Field(
        None,
        description="metric whose best checkpoint is kept beside the newest: NAME for the lowest, max:NAME for the highest",
        json_schema_extra=RUN_ONLY,
    )
    log_every: Positive = Field(
        20, description="steps between logged metrics", json_schema_extra=RUN_ONLY
    )
    image_every: NonNegative = Field(
        0, description="steps between logged images; 0: only at the end", json_schema_extra=RUN_ONLY
    )
    max_failures: NonNegative = Field(
        3,
        description="worker failures to recover from before the run fails",
        json_schema_extra=RUN_ONLY,
    )
    max_preemptions: Annotated[int, Field(ge=-1)] = Field(
        -1,
        description="node preemptions to recover from before the run fails; -1: any number",
        json_schema_extra=RUN_ONLY,
    )
    max_skipped: NonNegative = Field(
        5,
        description="consecutive steps to skip because the loss or a gradient is NaN or Inf; one more fails the run",
        json_schema_extra=RUN_ONLY,
    )
    check_every: NonNegative = Field(
        100,
        description="steps between checks that replicated weights are equal on all workers; 0: never",
        json_schema_extra=RUN_ONLY,
    )
    cache_dir: str | None = Field(
        None,
        description="local folder that caches whole shards of a remote artifact; default: read by ranges, without a cache",
        json_schema_extra=RUN_ONLY,
    )
    cache_gb: Rate = Field(
        100.0,
        description="largest size of cache_dir in GB; the least recently used shards are evicted first",
        json_schema_extra=RUN_ONLY,
    )
    data_window: Positive = Field(16, description="shards within which rows are shuffled")
    data_gb: Rate = Field(
        4.0,
        description="memory per worker for the shards of its current and next batches, in GB; what does not fit is read again",
        json_schema_extra=RUN_ONLY,
    )

    @model_validator(mode="after")
    def _offload_has_what_it_needs(self) -> Train:
        if self.offload != "none" and not self.zero_stage:
            raise ValueError(
                f"offload: {self.offload} needs ZeRO, but zero_stage is 0; set zero_stage: 1, 2 or 3"
            )
        if self.offload == "nvme" and (self.zero_stage != 3 or not self.offload_path):
            raise ValueError(
                f"offload: nvme needs zero_stage: 3 and offload_path, a folder on a local disk; found zero_stage: "
                f"{self.zero_stage} and offload_path: {self.offload_path}"
            )
        return self

    @model_validator(mode="after")
    def _muon_sees_matrices(self) -> Train:
        if self.optimizer == "muon" and self.zero_stage:
            raise ValueError(
                f"optimizer: muon needs whole matrices, which zero_stage={self.zero_stage} partitions; "
                "set zero_stage: 0, or optimizer: adamw"
            )
        return self
