"""Old rows that move less: the same model at the start, smaller steps by the factor, plain rows at
the end.
"""

from __future__ import annotations

import pytest
import torch

from smalti.mllm.row_lr_scaling import plain_rows, scale_old_rows_lr

EMBED, HEAD = "lm.model.embed_tokens.weight", "lm.lm_head.weight"


@pytest.fixture
def batch(tiny) -> dict[str, torch.Tensor]:
    v = tiny.vocabulary
    ids = torch.tensor([[5, 40, v.boi, v.first_visual, v.first_visual + 3, v.eoi, 41]])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def stepped(model, batch) -> dict[str, torch.Tensor]:
    """Plain weights after a step of Adam without clipping."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-14)
    model(batch)[0].backward()
    optimizer.step()
    return plain_rows(model, model.state_dict())


def test_old_rows_move_by_the_factor_and_all_else_as_before(tiny, make_tiny, batch) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    other, count = make_tiny().model, tiny.vocabulary.num_text
    scale_old_rows_lr(other, 0.125)
    for name, tensor in plain_rows(other, other.state_dict()).items():
        assert torch.equal(tensor, before[name]), name
    torch.testing.assert_close(other(batch)[0], tiny.model(batch)[0])
    usual, slow = stepped(tiny.model, batch), stepped(other, batch)
    for name in usual.keys() - {EMBED, HEAD}:
        if not name.endswith("k_proj.bias"):  # whose gradient is 0 but for rounding
            torch.testing.assert_close(slow[name], usual[name], rtol=1e-4, atol=1e-4, msg=name)
    for name in (EMBED, HEAD):
        moved, less = usual[name] - before[name], slow[name] - before[name]
        assert moved[:count].abs().max() > 9e-3
        # Adam's first step is of full size unless the gradient is near its epsilon
        clear = moved.abs() > 9.9e-3
        torch.testing.assert_close(
            less[:count][clear[:count]], 0.125 * moved[:count][clear[:count]], rtol=1e-2, atol=1e-5
        )
        torch.testing.assert_close(
            less[count:][clear[count:]], moved[count:][clear[count:]], rtol=1e-2, atol=1e-5
        )
