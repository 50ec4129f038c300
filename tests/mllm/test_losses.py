"""The chunked cross entropy against torch's on full logits."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from smalti.mllm.losses import IGNORE, LossHead, ScaledRows, chunked_cross_entropy


def problem(
    n: int = 37, d: int = 16, v: int = 101, dtype: torch.dtype = torch.float32, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).div(4).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::5] = IGNORE
    weights = torch.rand(n, generator=generator)
    return hidden, weight, bias, labels, weights


def reference(hidden, weight, bias, labels, weights):
    losses = F.cross_entropy(
        (hidden @ weight.T + bias).float(), labels, ignore_index=IGNORE, reduction="none"
    )
    return (losses * weights).sum(), losses


@pytest.mark.parametrize("chunk", [1, 5, 37, 4096])
def test_loss_and_gradients_equal_torch(chunk: int) -> None:
    hidden, weight, bias, labels, weights = problem()
    expected, losses = reference(hidden, weight, bias, labels, weights)
    expected_grads = torch.autograd.grad(3 * expected, (hidden, weight, bias))
    found = chunked_cross_entropy(hidden, weight, labels, chunk, bias_V=bias, weights_N=weights)
    grads = torch.autograd.grad(3 * found.total, (hidden, weight, bias))
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.losses_N, losses, rtol=1e-6, atol=1e-6)
    for grad, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=2e-6)


def test_gradients_equal_finite_differences_in_float64() -> None:
    hidden, weight, bias, labels, weights = problem(n=7, d=3, v=5, dtype=torch.float64)

    def total(*inputs: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(
            inputs[0], inputs[1], labels, 2, bias_V=inputs[2], weights_N=weights.double()
        ).total

    inputs = [hidden, weight, bias]
    grads = torch.autograd.grad(total(*inputs), inputs)
    for which, grad in enumerate(grads):
        for place in range(grad.numel()):
            step = torch.zeros(grad.numel(), dtype=torch.float64)
            step[place] = 1e-6
            moved = [t.detach() for t in inputs]
            ahead, behind = moved.copy(), moved.copy()
            ahead[which] = moved[which] + step.view_as(grad)
            behind[which] = moved[which] - step.view_as(grad)
            slope = (total(*ahead) - total(*behind)) / 2e-6
            assert abs(slope - grad.flatten()[place]) < 1e-7


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 20), v=st.integers(2, 40), chunk=st.integers(1, 25), seed=st.integers(0, 999)
)
def test_any_chunk_gives_the_same(n: int, v: int, chunk: int, seed: int) -> None:
    hidden, weight, bias, labels, weights = problem(n, 4, v, seed=seed)
    expected, _ = reference(hidden, weight, bias, labels, weights)
    found = chunked_cross_entropy(hidden, weight, labels, chunk, bias_V=bias, weights_N=weights)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    found = chunked_cross_entropy(hidden, weight, torch.tensor([1, 1]), 1)
    found.total.backward()
    assert found.losses_N.tolist() == [2e4, 0.0]
    assert torch.isfinite(hidden.grad).all()


def test_correct_marks_where_the_label_is_the_best() -> None:
    weight = torch.eye(4)
    hidden = 5 * weight[[2, 1, 0]]
    found = chunked_cross_entropy(hidden, weight, torch.tensor([2, 0, IGNORE]), 2)
    assert found.correct_N.tolist() == [True, False, False]


def test_bf16_gradients_have_their_tensors_dtype_and_float32_accuracy() -> None:
    hidden, weight, bias, labels, weights = problem(n=400, dtype=torch.bfloat16)
    found = chunked_cross_entropy(hidden, weight, labels, 8, bias_V=bias, weights_N=weights)
    grads = torch.autograd.grad(found.total, (hidden, weight, bias))
    assert found.total.dtype == torch.float32
    assert {grad.dtype for grad in grads} == {torch.bfloat16}
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    expected, _ = reference(*wide, labels, weights)
    for grad, right in zip(grads, torch.autograd.grad(expected, wide), strict=True):
        error = (grad.float() - right).norm() / right.norm()
        assert error < 0.01


def test_never_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, labels, _ = problem(n=64, v=500)
    largest = 0
    original = torch.Tensor.__matmul__

    def watched(self, other):
        nonlocal largest
        out = original(self, other)
        if out.shape[-1] == 500:
            largest = max(largest, out.shape[0])
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    chunked_cross_entropy(hidden, weight, labels, 8).total.backward()
    assert largest == 8


def test_all_ignored_gives_zero_and_zero_gradients() -> None:
    hidden, weight, _, labels, _ = problem()
    found = chunked_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE), 8)
    found.total.backward()
    assert found.total.item() == 0
    assert not weight.grad.any()
    assert not hidden.grad.any()


def test_backward_twice_is_refused() -> None:
    hidden, weight, _, labels, _ = problem()
    total = chunked_cross_entropy(hidden, weight, labels, 8).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        total.backward()


def test_label_outside_the_vocabulary_is_refused() -> None:
    hidden, weight, _, labels, _ = problem()
    labels[1] = 101
    with pytest.raises(IndexError, match=r"\[0, 101\)"):
        chunked_cross_entropy(hidden, weight, labels, 8)


def test_head_without_labels_is_a_linear_layer_and_with_labels_the_loss() -> None:
    hidden, weight, bias, labels, weights = problem()
    head = LossHead(16, 101)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    torch.testing.assert_close(head(hidden), F.linear(hidden, weight, bias))
    total, _, _ = head(hidden, labels, weights, 8)
    torch.testing.assert_close(total, reference(hidden, weight, bias, labels, weights)[0])


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.float() - right).norm() / right.norm())


@pytest.mark.parametrize("low_sums", [False, True])
def test_a_bf16_weights_gradient_in_parts_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, low_sums: bool
) -> None:
    """Sums of 50 chunks: in float32 as exact as one product, in bf16 rounded once a chunk; parts
    change nothing.
    """
    hidden, weight, _, labels, weights = problem(n=400, dtype=torch.bfloat16)
    wide = weight.detach().float().requires_grad_()
    expected, _ = reference(hidden.detach().float(), wide, 0, labels, weights)
    right = torch.autograd.grad(expected, wide)[0]

    def gradient() -> torch.Tensor:
        found = chunked_cross_entropy(
            hidden, weight, labels, 8, weights_N=weights, low_sums=low_sums
        )
        return torch.autograd.grad(found.total, weight)[0]

    whole = gradient()
    assert whole.dtype == torch.bfloat16
    assert relative(whole, right) < (0.02 if low_sums else 0.01)
    monkeypatch.setattr("smalti.mllm.losses.PART", 16 * 7)
    torch.testing.assert_close(gradient(), whole, rtol=0.01, atol=1e-3)


def test_scaled_rows_are_those_times_their_factor() -> None:
    hidden, weight, bias, labels, weights = problem()
    factor = torch.ones(101, 1)
    factor[:40] = 0.25
    expected, _ = reference(hidden, weight * factor, bias, labels, weights)
    rights = torch.autograd.grad(expected, (hidden, weight, bias))
    found = chunked_cross_entropy(
        hidden, weight, labels, 8, bias_V=bias, weights_N=weights, scaled=ScaledRows(40, 0.25)
    ).total
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for grad, right in zip(torch.autograd.grad(found, (hidden, weight, bias)), rights, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("low_weight", [False, True])
def test_under_autocast_every_product_is_in_its_dtype(low_weight: bool) -> None:
    """Float32 hidden states, as norms of a language model give them, and a head in float32 or,
    gathered, in bf16.
    """
    hidden, weight, bias, labels, weights = problem(n=400)
    weight = weight.detach().to(torch.bfloat16 if low_weight else torch.float32).requires_grad_()
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    expected, each = reference(*wide, labels, weights)
    rights = torch.autograd.grad(expected, wide)
    seen: list[torch.dtype] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
                seen.extend(t.dtype for t in args if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Products(), torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, weight, labels, 64, bias_V=bias, weights_N=weights)
        grads = torch.autograd.grad(found.total, (hidden, weight, bias))
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 2 * 3 * 5  # logits and two gradients of five chunks
    torch.testing.assert_close(found.losses_N, each, rtol=0.02, atol=0.02)
    for grad, right, tensor in zip(grads, rights, (hidden, weight, bias), strict=True):
        assert grad.dtype == tensor.dtype
        assert relative(grad, right) < 0.01


LIGER = """
import sys
import torch
from smalti.mllm.losses import chunked_cross_entropy
sys.path.insert(0, "tests/mllm")
from test_losses import problem, reference
for dtype, autocast, tolerance in ((torch.float32, False, 1e-5), (torch.bfloat16, False, 0.01), (torch.float32, True, 0.01)):
    hidden, weight, bias, labels, weights = problem(n=23, dtype=dtype)
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    expected, each = reference(*wide, labels, weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = chunked_cross_entropy(hidden, weight, labels, 8, bias_V=bias, weights_N=weights, kernel=True)
    torch.testing.assert_close(found.losses_N, each, rtol=tolerance, atol=tolerance)
    for grad, right in zip(torch.autograd.grad(found.total, (hidden, weight, bias)), torch.autograd.grad(expected, wide)):
        assert (grad.float() - right).norm() < tolerance * right.norm()
    best = (wide[0] @ wide[1].T + wide[2]).argmax(1)
    assert found.correct_N.tolist() == ((best == labels) & (labels >= 0)).tolist()
"""


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_ligers_kernel_gives_the_same_under_tritons_interpreter(root) -> None:
    """On the CPU, in a process of its own: the interpreter is chosen when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIGER], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
