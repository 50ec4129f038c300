"""What every section of a recipe shares: strict values, and how one model is trained."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion (an int may stand for a float).

    late: keys that a dump leaves out while they have their defaults. They came after results were fingerprinted, or belong
    to one system alone; so the fingerprints of what does without them stay.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    late: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_late(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped = handler(self)
        for name in self.late:
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                dumped.pop(name, None)
        return dumped


class Train(Section):
    """How one model is trained; the same keys for every training stage."""

    steps: Positive = Field(1000, description="optimizer steps")
    batch_size: Positive = Field(64, description="samples a step over all workers and accumulation steps")
    micro_batch_size: Positive | None = Field(
        None, description="samples a worker and forward; default: no accumulation"
    )
    lr: Rate = Field(1e-4, description="peak learning rate")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for linear layers; AdamW for the rest")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False)
    weight_decay: Weight = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Weight = Field(0.03, description="warmup: below 1 a fraction of the steps, else steps")
    min_lr: Fraction = Field(0.0, description="end of the cosine as a fraction of lr")
    clip: Weight = Field(1.0, description="gradient norm bound; 0 is off")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where optimizer states lie, and under ZeRO-3 weights too: the device, main memory, a disk"
    )
    offload_path: str | None = Field(None, description="offload: nvme: a folder on each machine's own NVMe disk")
    activation_checkpointing: bool = Field(
        False, description="compute the activations of each block again on the way back: less memory, more time"
    )
    compile: bool = Field(False, description="torch.compile of each transformer block (needs a C++ compiler)")
    checkpoint_every: Positive = Field(500, description="steps between checkpoints")
    keep: Positive = Field(2, description="newest whole checkpoints kept")
    best: str | None = Field(
        None, description="metric whose best checkpoint is kept beside the newest; lowest, or highest as max:NAME"
    )
    log_every: Positive = Field(20, description="steps between logged metrics")
    image_every: NonNegative = Field(0, description="steps between logged pictures; 0: only at the end")
    max_failures: NonNegative = Field(3, description="worker failures survived before the run fails")
    max_preemptions: Annotated[int, Field(ge=-1)] = Field(
        -1, description="times that nodes may be taken away before the run fails; -1: any number"
    )
    max_skipped: NonNegative = Field(
        5,
        description="steps in a row passed over for a loss or gradient that is no finite number; one more ends the run",
    )
    check_every: NonNegative = Field(
        100, description="steps between comparisons of what every worker holds whole; 0: never"
    )
    cache_dir: str | None = Field(
        None, description="local folder for whole shards of a distant artifact; default: read by ranges, nothing kept"
    )
    cache_gb: Rate = Field(100.0, description="bound of cache_dir in GB; the least recently used shards leave first")
    data_window: Positive = Field(16, description="shards within which rows are shuffled")
    data_gb: Rate = Field(
        4.0, description="memory of a worker for the shards that its batches lie in and the next, in GB; else read anew"
    )

    @model_validator(mode="after")
    def _offload_has_what_it_needs(self) -> Train:
        if self.offload != "none" and not self.zero_stage:
            raise ValueError(f"offload: {self.offload} is ZeRO's, but zero_stage is 0; set zero_stage: 1, 2 or 3")
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
                f"optimizer: muon needs whole matrices, which zero_stage={self.zero_stage} cuts up; "
                "set zero_stage: 0, or optimizer: adamw"
            )
        return self
