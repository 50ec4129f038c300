"""The optimizers a recipe can name: AdamW, and Muon for the weights of linear layers with AdamW for
all else.

Muon (Jordan et al. 2024; update scale of arXiv 2502.16982, Eq. 4) replaces a matrix's momentum by
its nearest semi-orthogonal matrix, so that every direction of a layer moves alike. Embeddings and
output heads, whose rows are looked up one by one, and vectors (biases, norms, scales) are AdamW's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smalti.mllm.losses import LossHead
from smalti.workflows.train.deepspeed_compat import full_shape

if TYPE_CHECKING:
    from smalti.schema import Train


def build_optimizer(
    module: nn.Module, train: Train, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """`train.optimizer` over the trainable parameters; weight decay on matrices only (no biases,
    norms or scales).

    A module with `rate_parts` that names any gets groups of its own for each (`group["part"]`).
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    hidden = hidden_matrices(module) if train.optimizer == "muon" else []
    taken = {id(p) for p in hidden}
    others = [p for p in trained if len(full_shape(p)) > 1 and id(p) not in taken]
    groups = [
        {"params": hidden, "weight_decay": train.weight_decay, "muon": True},
        {"params": others, "weight_decay": train.weight_decay, "muon": False},
        {
            "params": [p for p in trained if len(full_shape(p)) <= 1],
            "weight_decay": 0.0,
            "muon": False,
        },
    ]
    part_of: Mapping[int, str] = getattr(module, "rate_parts", dict)()
    groups = [piece for group in groups for piece in by_part(group, part_of) if piece["params"]]
    if hidden:
        return MuonAdamW(groups, lr=lr, betas=train.betas, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=train.betas, fused=True)


def by_part(group: dict[str, Any], part_of: Mapping[int, str]) -> list[dict[str, Any]]:
    """A group cut by the parts of its parameters (`id` → part), in the order in which they are met;
    no parts: the group.
    """
    if not part_of:
        return [group]
    pieces: dict[str, dict[str, Any]] = {}
    for parameter in group["params"]:
        part = part_of[id(parameter)]
        pieces.setdefault(part, group | {"params": [], "part": part})["params"].append(parameter)
    return list(pieces.values())


def hidden_matrices(module: nn.Module) -> list[torch.Tensor]:
    """Trainable weights of linear layers, but for a vocabulary's head, whose rows are looked up one
    by one.
    """
    layers = [
        m for m in module.modules() if isinstance(m, nn.Linear) and not isinstance(m, LossHead)
    ]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon` take Muon's step; one list of groups, one state, as DeepSpeed
    wants it.
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
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
        self.muon.param_groups, self.muon.state = groups, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` ends in.

        AdamW's own looks for its keys in every state, also in Muon's.
        """
        torch.optim.Optimizer.__setstate__(self, state)
        self._link()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        every = self.param_groups
        self.param_groups = [group for group in every if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        self.muon.step()
        return loss
