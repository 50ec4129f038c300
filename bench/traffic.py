"""Bytes that the workers of a training step send each other, counted, beside those of `smalti
plan`: a small language model.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smalti.config import load_recipe
from smalti.schema import LanguageModel, MllmSection, Recipe, Train
from smalti.workflows.plan.base import Rates
from smalti.workflows.plan.models import Model
from smalti.workflows.plan.training import TrainPlan
from smalti.workflows.plan.trial import Trial
from smalti.workflows.systems.registry import system_of
from smalti.workflows.train import deepspeed_compat, engines, guards

WORKERS, LENGTH = 2, 16
ROUNDS = {
    "allreduce_": 2,
    "_allgather_base_": 1,
    "allgather_": 1,
    "_reduce_scatter_base_": 1,
    "broadcast_": 1,
}
"""How often a ring passes the data of a collective on."""
SCALE = {
    "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 1_000_000,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_param_persistence_threshold": 10_000,
}
"""ZeRO-3's sizes for a model that is about a thousandth of 7B parameters."""


class Sent(TorchDispatchMode):
    """Counts what the collectives called within send, in bytes of the whole data: a ring of N
    workers sends (N − 1)/N of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname != "barrier":
            sizes = [_bytes(argument) for argument in args]
            self.whole[func._opname] += ROUNDS[func._opname] * max(sizes)
        return func(*args, **(kwargs or {}))

    @property
    def sent(self) -> float:
        """Bytes that this worker sends."""
        num = dist.get_world_size()
        return self.whole.total() * (num - 1) / num


def _bytes(argument: Any) -> int:
    return sum(
        leaf.numel() * leaf.element_size()
        for leaf in tree_leaves(argument)
        if isinstance(leaf, Tensor)
    )


def recipe_of(train: Train, hidden: int, layers: int) -> Recipe:
    """A recipe whose language model is this large, over 64 codes."""
    size = LanguageModel(
        hidden_size=hidden,
        layers=layers,
        heads=4,
        kv_heads=4,
        intermediate_size=hidden,
        text_vocab_size=300,
    )
    recipe = load_recipe("semhitok-quickstart", ["codebook.size=16", "tokenizer.pixel.codes=4"])
    return recipe.model_copy(
        update={"mllm": MllmSection(config=size, max_length=LENGTH, loss_chunk=LENGTH, train=train)}
    )


def model_of(recipe: Recipe) -> Model:
    return next(model for model in system_of(recipe).planned_models(recipe) if model.name == "mllm")


def planned(recipe: Recipe) -> float:
    """Bytes that a worker sends in a step, by `smalti plan`."""
    return TrainPlan(
        Trial(model_of(recipe)), Rates("box", 1e12, 1e9, 16e9, "stated"), WORKERS
    ).traffic


def counted(recipe: Recipe) -> Sent:
    """What `Sent` counts on this worker in a real step, the third; every worker calls it."""
    train: Train = recipe.mllm.train
    module: Any = model_of(recipe).modules["model"].to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    module.loss_chunk = LENGTH
    engine = engines.build_engine(
        module,
        train,
        lr=train.lr,
        zero_stage=train.zero_stage,
        world_size=WORKERS,
        device=torch.device("cpu"),
    )
    for _ in range(2):  # ZeRO-3 learns the order of the modules
        _step(engine, train)
    with Sent() as watch:
        _step(engine, train)
    return watch


def _step(engine: nn.Module, train: Train) -> None:
    """A step as the training loop takes it."""
    micro, count = engines.accumulation(train, WORKERS)
    for done in range(count):
        ids = torch.randint(300, (micro, LENGTH))
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        batch |= {
            name: torch.zeros_like(ids) for name in ("document_ids", "segment_ids", "position_ids")
        }
        engine.backward(guards.poisoned(engine(batch)[0]))  # type: ignore[operator]
        if done < count - 1:
            engine.step()  # type: ignore[operator]
    deepspeed_compat.apply(engine, deepspeed_compat.gradient_norm(engine))
