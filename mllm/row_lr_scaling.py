"""The text's own rows of embedding and head, kept so that they move less than the new ones.

Adam's steps are as large as the rate, whatever the size of the gradients. So a row that is kept
divided by a factor and used times it moves by the factor times the rate: under any ZeRO stage, and
with any optimizer of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smalti.mllm.losses import Scaled
from smalti.mllm.rows import ranges

if TYPE_CHECKING:
    from smalti.mllm.model import UnifiedModel


@torch.no_grad()
def slow_old_rows(model: UnifiedModel, factor: float) -> None:
    """Let the text's rows move `factor` times as far as the new ones, in place; what the model
    computes stays the same.

    Its head then gives losses alone. In a parallel run every rank calls it.
    """
    embed, head = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()
    model.old_rows = head.scaled = Scaled(model.vocabulary.num_text, factor)
    for matrix in (embed, head):
        rows = model.matrices.rows(matrix.weight)
        for start, stop in ranges(0, model.vocabulary.num_text, rows.step):
            rows.write(start, rows.read(start, stop) / factor)


def plain_rows(model: UnifiedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's whole state dict with the rows as they are used."""
    found = dict(state)
    if model.old_rows is not None:
        count, factor = model.old_rows
        matrices = {
            id(m.weight)
            for m in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings())
        }
        for name in [
            name for name, parameter in model.named_parameters() if id(parameter) in matrices
        ]:
            found[name] = torch.cat([found[name][:count] * factor, found[name][count:]])
    return found
