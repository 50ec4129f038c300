"""The optimizers a recipe can name: AdamW, and Muon for the weights of linear layers.

Muon (Jordan et al. 2024; update scale of arXiv 2502.16982, Eq. 4) replaces a matrix's momentum by
its nearest semi-orthogonal matrix, so that the update has the same size in every direction of a
layer. Embeddings and output heads, whose rows are looked up one by one, and vectors (biases, norms,
scales) are updated by AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smalti.mllm.losses import LossHead
from smalti.workflows.train.deepspeed_compat import ParamGroup, full_shape

if TYPE_CHECKING:
    from smalti.schema import Train


def build_optimizer(
    module: nn.Module, train: Train, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """`train.optimizer` over the trainable parameters of a module.

    Weight decay applies to matrices only (no biases, norms or scales). A module whose `rate_parts`
    names parts gets groups of its own for each of them (`group["part"]`).

    Raises:
        ValueError: the module has no trainable parameter.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    hidden = hidden_matrices(module) if train.optimizer == "muon" else []
    taken = {id(p) for p in hidden}
    others = [p for p in trained if len(full_shape(p)) > 1 and id(p) not in taken]
    groups: list[ParamGroup] = [
        {"params": hidden, "weight_decay": train.weight_decay, "muon": True},
        {"params": others, "weight_decay": train.weight_decay, "muon": False},
        {
            "params": [p for p in trained if len(full_shape(p)) <= 1],
            "weight_decay": 0.0,
            "muon": False,
        },
    ]
    part_of: Mapping[int, str] = getattr(module, "rate_parts", dict)()
    groups = [own for group in groups for own in by_part(group, part_of) if own["params"]]
    if hidden:
        return MuonAdamW(groups, lr=lr, betas=train.betas, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=train.betas, fused=True)


def by_part(group: ParamGroup, part_of: Mapping[int, str]) -> list[ParamGroup]:
    """Divide a group by the parts of its parameters, in the order of their first ones.

    Args:
        group: to divide.
        part_of: part by `id` of a parameter; empty: the group stays whole.
    """
    if not part_of:
        return [group]
    groups: dict[str, ParamGroup] = {}
    for parameter in group["params"]:
        part = part_of[id(parameter)]
        groups.setdefault(part, group | {"params": [], "part": part})["params"].append(parameter)
    return list(groups.values())


def hidden_matrices(module: nn.Module) -> list[Tensor]:
    """Trainable weights of linear layers, except a vocabulary's head.

    The head's rows are looked up one by one.
    """
    layers = [
        m for m in module.modules() if isinstance(m, nn.Linear) and not isinstance(m, LossHead)
    ]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon` take Muon's step.

    It has one list of groups and one state, as DeepSpeed requires.
    """

    def __init__(self, params: list[ParamGroup], **defaults: Any) -> None:
        super().__init__(params, **defaults)
        self._link()

    def _link(self) -> None:
        """Muon over this optimizer's own groups and state."""
        groups = [group for group in self.param_groups if group["muon"]]
        self.muon = torch.optim.Muon(
            [{"params": group["params"]} for group in groups], adjust_lr_fn="match_rms_adamw"
        )
        for group in groups:
            for name, value in self.muon.defaults.items():
                group.setdefault(name, value)
        self.muon.param_groups = groups
        self.muon.state = self.state

    def __setstate__(self, state: dict[str, object]) -> None:
        """Called at the end of `load_state_dict`.

        AdamW's own expects its keys in every state, also in Muon's.
        """
        torch.optim.Optimizer.__setstate__(self, state)
        self._link()

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        every = self.param_groups
        self.param_groups = [group for group in every if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        self.muon.step()
        return loss
