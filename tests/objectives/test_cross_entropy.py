"""Chunked cross-entropy against PyTorch's own on full logits."""

import pytest
import torch
from torch.nn import functional as F

from layerwise.objectives.cross_entropy import linear_cross_entropy


def _problem(n=23, width=8, vocab=31, dtype=torch.float64, bias=True):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=g, dtype=dtype, requires_grad=True)
    shift = torch.randn(vocab, generator=g, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, shift, torch.randint(vocab, (n,), generator=g)


@pytest.mark.parametrize("chunk", [1, 7, 23, 100, None])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_equal_full_logits(chunk, bias):
    hidden, weight, shift, labels = _problem(bias=bias)
    inputs = [t for t in (hidden, weight, shift) if t is not None]
    ours = linear_cross_entropy(hidden, weight, labels, shift, chunk)
    full = F.cross_entropy(F.linear(hidden, weight, shift), labels, reduction="sum")
    torch.testing.assert_close(ours, full, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * full, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_only_the_gradients_that_are_needed():
    hidden, weight, shift, labels = _problem()
    loss = linear_cross_entropy(hidden.detach(), weight, labels, shift.detach(), 5)
    (grad,) = torch.autograd.grad(loss, [weight])
    full = F.cross_entropy(F.linear(hidden, weight, shift), labels, reduction="sum")
    torch.testing.assert_close(grad, torch.autograd.grad(full, [weight])[0], rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_no_rows_is_zero_with_zero_gradients():
    hidden, weight, _, _ = _problem()
    loss = linear_cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.long))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, [weight])[0].abs().max() == 0


def test_bfloat16_sums_in_float32():
    hidden, weight, _, labels = _problem(n=400, dtype=torch.float32, bias=False)
    half = linear_cross_entropy(hidden.bfloat16(), weight, labels, None, 37)
    assert half.dtype == torch.float32
    exact = F.cross_entropy(hidden.bfloat16().float() @ weight.bfloat16().float().T, labels, reduction="sum")
    assert abs(half - exact) / exact < 5e-3


def test_huge_logits_stay_finite():
    hidden, weight, _, labels = _problem()
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    full = F.cross_entropy(hidden * 1e4 @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(loss, full)
