"""Checksums, skipped steps and losses that are not finite; several ranks are in test_state.py."""

from __future__ import annotations

import pytest
import torch

from smalti.schema import Train
from smalti.workflows.train import guards


def test_a_checksum_sees_every_byte_and_its_place() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0])
    assert guards.checksum(values) == guards.checksum(values.clone())
    others = [values + 1e-7, values.flip(0), values[:4], -values, values.to(torch.float64)]
    assert len({int(guards.checksum(other)) for other in [values, *others]}) == 6
    assert int(guards.checksum(torch.tensor([True, False, True]))) != int(
        guards.checksum(torch.tensor([True, True, True]))
    )


def test_too_many_skipped_steps_in_a_row_are_noticed() -> None:
    skips = guards.SkipCount(2)
    found = [skips.note(skipped) for skipped in (True, True, False, True, True, True)]
    assert found == [False, False, False, False, False, True]
    assert skips.state_dict() == {"total": 5, "in_row": 3}
    other = guards.SkipCount(2)
    other.load_state_dict(skips.state_dict())
    assert other.note(True)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_a_loss_that_is_not_finite_has_gradients_that_are_nan(value: float) -> None:
    weight = torch.ones((), requires_grad=True)
    loss = guards.poisoned(weight * 0 + value)
    loss.backward()
    assert loss.isnan() and weight.grad is not None and weight.grad.isnan()


def test_a_finite_loss_is_unchanged() -> None:
    weight = torch.ones((), requires_grad=True)
    loss = guards.poisoned(3 * weight)
    loss.backward()
    assert float(loss.detach()) == 3.0 and float(weight.grad) == 3.0


def test_the_error_names_the_steps_and_the_loss_of_this_worker() -> None:
    train = Train(steps=24, max_skipped=2)
    error = guards.not_finite(9, train, 1e-3, [{"loss": float("nan")}, {"loss": 1.0}])
    assert "steps 8 to 10 of 24 is not finite" in str(error)
    assert "loss nan on this worker" in str(error) and "loss 1" not in str(error)
