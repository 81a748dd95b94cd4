"""Gradients of matrices brought to a standard size: by output unit, by input unit, by entry, or in all directions at once."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalization = Literal["column", "row", "sign", "spectral", "none"]
TINY = 1e-8


def rms(x: Float[Tensor, "out in"], dim: int) -> Tensor:
    """Root mean square along `dim`, kept as an axis of length 1 and never below 1e-8."""
    return x.square().mean(dim=dim, keepdim=True).sqrt_().clamp_min_(TINY)


def orthogonalized(g: Float[Tensor, "out in"], steps: int = 5) -> Float[Tensor, "out in"]:
    """Roughly U V^T for g = U S V^T, by Newton-Schulz iterations of a quintic tuned for speed: singular values near 1, not at 1.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Computed in bfloat16 on a GPU, in
    float32 on a CPU, where bfloat16 is slower and not smaller.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide else x.mT).to(g.dtype)


def normalized(g: Float[Tensor, "out in"], how: Normalization, inputs: int = 1) -> Float[Tensor, "out in"]:
    """The gradient of y = W x at a standard size; its root mean square is about 1, so learning rates carry over.

    column: each output unit's weights by their own root mean square. (A column of the paper's d_in x d_out matrix is a row of PyTorch's.)
    row: each input unit's weights by theirs. sign: entry by entry. spectral: all singular values near 1, times
    sqrt(max(out, in)), which gives a root mean square near 1. none: as it is.

    Args:
        inputs: the axis that runs over input units: 1 for a linear map's (out, in), 0 for an embedding's (vocabulary, width).
    """
    if how == "column":
        return g / rms(g, inputs)
    if how == "row":
        return g / rms(g, 1 - inputs)
    if how == "sign":
        return g.sign()
    if how == "spectral":
        return orthogonalized(g) * max(g.shape) ** 0.5
    return g
