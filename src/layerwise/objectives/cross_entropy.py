"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits held at a time, 16 MiB in float32: a few rows of a large vocabulary stay in the last-level cache."""


def linear_cross_entropy(
    hidden: Float[Tensor, "n width"],
    weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, " n"],
    bias: Float[Tensor, " vocab"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of -log softmax(hidden @ weight.T + bias)[labels], computed a few rows at a time.

    The gradients are made in the same sweep, while a chunk's logits are at hand, so nothing of size n x vocab is kept or
    computed twice. Logits and sums are float32 (or float64 for float64 inputs) whatever the inputs are.

    Args:
        labels: every one a vocabulary index; drop rows without a label before the call.
        chunk: rows at a time (None: as many as `CHUNK_ELEMENTS` allows).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    rows = chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        matrix = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=exact)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and want_bias else None
        for start in range(0, len(hidden), rows):
            h, y = hidden[start : start + rows], labels[start : start + rows, None]
            logits = (h @ matrix.T).to(exact)
            if bias is not None:
                logits += bias
            top = logits.logsumexp(dim=1, keepdim=True)
            total += (top - logits.gather(1, y)).sum()
            if not any(ctx.needs_input_grad[:3]):
                continue
            slope = logits.sub_(top).exp_()
            slope.scatter_add_(1, y, slope.new_full((1, 1), -1.0).expand_as(y))
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, matrix, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                if grad_weight.dtype == slope.dtype:
                    grad_weight.addmm_(slope.T, h)
                else:
                    grad_weight += slope.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        hidden, weight, bias = ctx.saved_tensors
        return (
            None if hidden is None else hidden * scale.to(hidden.dtype),
            None if weight is None else (weight * scale).to(ctx.dtypes[0]),
            None if bias is None else (bias * scale).to(ctx.dtypes[1]),
            None,
            None,
        )
