"""The optimizers: who takes which parameter, and that the two in one behave as the two alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from smalti.config import load_recipe
from smalti.errors import ConfigError
from smalti.mllm.losses import LossHead
from smalti.schema import Train
from smalti.workflows.train.engines import set_factors, set_learning_rate
from smalti.workflows.train.optimizers import build_optimizer, hidden_matrices

MUON = Train(optimizer="muon", lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = LossHead(8, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.embed(ids))))


def grown(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, torch.Tensor]:
    for step in steps:
        ids = torch.randint(7, (5,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def test_muon_takes_linear_layers_and_neither_embeddings_nor_the_head() -> None:
    model = small()
    assert [p is model.hidden.weight for p in hidden_matrices(model)] == [True]
    model.hidden.weight.requires_grad_(False)
    assert hidden_matrices(model) == []


def test_two_optimizers_in_one_step_as_torchs_two_do_alone() -> None:
    model, other = small(), small()
    both = build_optimizer(model, MUON, 0.01, torch.device("cpu"))
    muon = torch.optim.Muon(
        [other.hidden.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    matrices = [other.embed.weight, other.head.weight]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)

    class Two:
        def step(self) -> None:
            muon.step()
            adamw.step()

        def zero_grad(self) -> None:
            muon.zero_grad()
            adamw.zero_grad()

    for group in both.param_groups:
        assert group["lr"] == 0.01
    found, wanted = grown(model, both, range(4)), grown(other, Two(), range(4))  # type: ignore[arg-type]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    moved = (found["hidden.weight"] - small().hidden.weight).norm()
    assert moved > 0.01


def test_a_loaded_state_goes_on_as_if_it_had_never_been_saved() -> None:
    model = small()
    optimizer = build_optimizer(model, MUON, 0.01, torch.device("cpu"))
    grown(model, optimizer, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    unbroken = grown(model, optimizer, range(3, 6))
    again = small()
    again.load_state_dict(weights)
    resumed = build_optimizer(again, MUON, 0.01, torch.device("cpu"))
    resumed.load_state_dict(saved)
    found = grown(again, resumed, range(3, 6))
    assert all(torch.equal(found[name], unbroken[name]) for name in unbroken)


def test_the_rate_of_every_group_follows_the_schedule() -> None:
    model = small()
    optimizer = build_optimizer(model, MUON, 0.01, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert all(
        torch.equal(found, before[name])
        for name, found in grown(model, optimizer, range(2)).items()
    )


def test_muon_with_cut_up_matrices_is_refused_with_the_recipe() -> None:
    with pytest.raises(ConfigError, match="zero_stage=2"):
        load_recipe(
            "recipes/semhitok-quickstart.yaml",
            ["mllm.train.optimizer=muon", "mllm.train.zero_stage=2"],
        )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parts_have_groups_and_rates_of_their_own(optimizer: str) -> None:
    model = small()
    model.rate_parts = lambda: {
        id(p): "new_rows" if name.startswith(("embed", "head")) else "backbone"
        for name, p in model.named_parameters()
    }
    made = build_optimizer(
        model, MUON.model_copy(update={"optimizer": optimizer}), 0.01, torch.device("cpu")
    )
    parts = [group["part"] for group in made.param_groups]
    assert set(parts) == {"new_rows", "backbone"}
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
    engine = SimpleNamespace(optimizer=made)
    set_factors(engine, {"new_rows": 0.0, "backbone": 0.5})
    set_learning_rate(engine, 0.1)
    assert [group["lr"] for group in made.param_groups] == [
        0.05 if part == "backbone" else 0.0 for part in parts
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = grown(model, made, range(2))
    for name, old in before.items():
        assert torch.equal(old, after[name]) == name.startswith(("embed", "head")), name
