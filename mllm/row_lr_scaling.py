"""Scale the learning rate of the text's own rows of embedding and head.

Adam's steps are as large as the learning rate, whatever the size of the gradients. A row that is
stored divided by a factor and multiplied by it where it is used therefore moves by the factor times
the learning rate: under any ZeRO stage, and with any optimizer of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smalti.mllm.losses import ScaledRows
from smalti.mllm.rows import ranges

if TYPE_CHECKING:
    from smalti.mllm.model import UnifiedModel


@torch.no_grad()
def scale_old_rows_lr(model: UnifiedModel, factor: float) -> None:
    """Scale the learning rate of the text rows by `factor`, in place.

    What the model computes stays the same, but its head then gives losses only, no logits. In a
    parallel run every rank calls it.
    """
    scaled = ScaledRows(model.vocabulary.num_text, factor)
    model.old_rows = scaled
    model.head.scaled = scaled
    for matrix in (model.embedding, model.head):
        rows = model.matrices.rows(matrix.weight)
        for start, stop in ranges(0, model.vocabulary.num_text, rows.step):
            rows.write(start, rows.read(start, stop) / factor)


def plain_rows(model: UnifiedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's whole state dict, with the text rows multiplied by their factor."""
    found = dict(state)
    if model.old_rows is None:
        return found
    count, factor = model.old_rows
    matrices = {id(model.embedding.weight), id(model.head.weight)}
    for name, parameter in model.named_parameters():
        if id(parameter) in matrices:
            found[name] = torch.cat([found[name][:count] * factor, found[name][count:]])
    return found
