"""What a recipe trains, as the planner sees it: modules on the meta device and a training task.

Axis letters: B samples, L positions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from smalti.schema import Recipe, Train
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.siglip import build_siglip
from smalti.workflows.plan.configs import vision_config
from smalti.workflows.plan.trace import Autocast, Backward, Step
from smalti.workflows.train.deepspeed_compat import Engine
from smalti.workflows.train.engines import SENT_LOW
from smalti.workflows.train.optimizers import hidden_matrices
from smalti.workflows.train.task import Task

LATE = sys.maxsize
"""A step by which every loss takes part and every codebook has started."""


@dataclass(frozen=True)
class Head:
    """Sizes of an output head whose loss works in chunks of positions.

    Attributes:
        rows: of its matrix, one per token.
        width: of its input.
        length: positions of a sample.
        chunk: positions of a chunk.
        trained: whether its weight is.
        depths: classifiers of visual places beside it, which run one after the other.
        codes: rows of each classifier.
    """

    rows: int
    width: int
    length: int
    chunk: int
    trained: bool = True
    depths: int = 0
    codes: int = 0

    @property
    def every(self) -> int:
        """Rows of all matrices."""
        return self.rows + self.depths * self.codes

    @property
    def at_once(self) -> int:
        """Rows of the largest matrix."""
        return max(self.rows, self.codes)


class TracedEngine:
    """A module under autocast: of DeepSpeed's engine, what the losses of tasks use."""

    def __init__(self, module: nn.Module, autocast: Autocast) -> None:
        self.module = module
        self.autocast = autocast

    def __call__(self, *args: object, **kwargs: object) -> object:
        with self.autocast():
            return self.module(*args, **kwargs)


@dataclass(frozen=True)
class Model:
    """One trained stage.

    Attributes:
        name: the stage, or the tokenizer's phase.
        section: key of its training section in the recipe.
        what: one line about it.
        train: its training section.
        task: the training task, built on the meta device.
        origin: where sizes come from, if not from the recipe.
        head: output head of a language model.
        packed: several samples share a row of the longest length.
        pixels: side of the images, 0 without.
    """

    name: str
    section: str
    what: str
    train: Train
    task: Task
    origin: str = ""
    head: Head | None = None
    packed: bool = False
    pixels: int = 0

    @cached_property
    def modules(self) -> nn.ModuleDict:
        """Everything on the GPU, by name: what trains, and what the task's losses use."""
        return nn.ModuleDict(self.task.modules() | self.task.frozen_modules())

    @cached_property
    def engines(self) -> dict[str, int]:
        """ZeRO stage of each trained module."""
        return {name: self.task.zero_stage(name) for name in self.task.modules()}

    @property
    def traced_sizes(self) -> tuple[int, int]:
        """Samples of the two micro batches that are traced; their costs give those of others.

        Two and four images: with one, what does not grow with the batch can be the most.
        """
        return (1, 2) if self.head else (2, 4)

    def step(self, num: int) -> Step:
        """A micro batch of `num` samples through the task's own losses, as the loop runs it."""
        self.task.skipped(LATE)  # forget what an earlier step gathered
        batch = self.task.planned_batch(num)
        share = self.task.totals(batch)
        trained = {name: self.modules[name].train() for name in self.engines}

        def run(backward: Backward, autocast: Autocast) -> None:
            engines = {name: TracedEngine(module, autocast) for name, module in trained.items()}
            for name in engines:
                found = self.task.loss(
                    name, cast(Mapping[str, Engine], engines), batch, LATE, share
                )
                if found is not None:
                    backward(found[0])

        return run

    def parameters(self, engine: str | None = None) -> int:
        """Trained parameters of an engine; without a name all on the GPU, frozen ones too."""
        if engine is None:
            return sum(p.numel() for p in self.modules.parameters())
        return sum(p.numel() for p in self.modules[engine].parameters() if p.requires_grad)

    def frozen_in(self, engine: str) -> int:
        """Frozen parameters of an engine: `mllm.freeze`, or the weights beside low-rank updates."""
        return sum(p.numel() for p in self.modules[engine].parameters() if not p.requires_grad)

    def sent_low(self, engine: str, *, trained: bool) -> int:
        """Trained (or frozen) parameters of an engine that are sent in bf16 (`SENT_LOW`)."""
        if self.train.precision != "bf16":
            return 0
        layers = [module for module in self.modules[engine].modules() if type(module) in SENT_LOW]
        own = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
        return sum(p.numel() for p in own.values() if p.requires_grad == trained)

    def muon(self, engine: str) -> int:
        """Parameters with one moment instead of AdamW's two."""
        if self.train.optimizer != "muon":
            return 0
        return sum(weight.numel() for weight in hidden_matrices(self.modules[engine]))

    @property
    def frozen(self) -> int:
        """Parameters outside the engines, and numbers in buffers: whole on every GPU."""
        inside = sum(self.parameters(engine) + self.frozen_in(engine) for engine in self.engines)
        return self.parameters() - inside + sum(b.numel() for b in self.modules.buffers())

    @property
    def largest(self) -> int:
        """Parameters of the largest single module, which ZeRO-3 gathers whole."""
        own = (
            sum(p.numel() for p in m.parameters(recurse=False))
            for m in self.modules["model"].modules()
        )
        return max(own)


def encoder_of(recipe: Recipe) -> tuple[VisionEncoder, str]:
    """The frozen encoder on the meta device, and where its sizes come from."""
    section = recipe.encoder
    with torch.device("meta"):
        if section.train is not None:
            size = recipe.corpus.image_size
            siglip = build_siglip(section.train, size, section.train.text_vocab_size, 0, 1)
            own = siglip.config.vision_config
            assert isinstance(own, SiglipVisionConfig)
            return VisionEncoder(SiglipVisionModel(own), section.layer), ""
        config, origin = vision_config(section.pretrained or "")
        return VisionEncoder(SiglipVisionModel(config), section.layer), origin
