"""GPTQ: columns rounded one after another, each one's error moved to the columns that are still free."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from layerwise.nn.integers import Grid, find_grid

BLOCK = 128


def gptq(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = False,
    clip: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    stored: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    """Codes Q that make tr((W - Q) H (W - Q)^T) small, and their grid.

    Inputs that never occur (zero on H's diagonal) get the code of 0. A group's grid is made when its first column is reached, from the
    columns as moved by then; with `act_order` all grids are made beforehand, so that groups stay runs of neighbours
    in the stored order and no index of groups is needed (the published code calls this static groups).

    Args:
        hessian: sum of x x^T over inputs x, in any unit. bits, group, symmetric, clip, stored: see `find_grid`.
        act_order: columns in order of falling diagonal of H. damping: share of H's mean diagonal added to the diagonal; ten times
            as much is taken until a Cholesky factor exists.

    Source: Frantar et al. 2022, "GPTQ" (arXiv 2210.17323), algorithm 1 and published code.
    """
    w, h = weight.float().clone(), hessian.float().clone()
    width = w.shape[1]
    diagonal = torch.diagonal(h)
    dead = diagonal == 0
    diagonal[dead] = 1.0
    w[:, dead] = 0.0
    size = width if group is None else group
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(width, device=w.device)
    static = find_grid(w, bits, size, symmetric=symmetric, clip=clip, stored=stored) if act_order or size >= width else None
    # Turned around, so that the numbers of a column, which are rounded together, lie side by side.
    w, h = w.t()[order].contiguous(), h[order][:, order]
    factor = _factor(h, damping)
    pivots, of = torch.diagonal(factor).tolist(), (order // size).tolist()
    scales = [] if static is None else list(static.scales.t().contiguous())
    zeros = [] if static is None else list(static.zeros.t().contiguous())
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    block = BLOCK if static is not None else math.gcd(size, BLOCK) if size > BLOCK else size
    for start in range(0, width, block):
        end = min(start + block, width)
        if static is None and start % size == 0:
            made = find_grid(w[start : start + size].t(), bits, None, symmetric=symmetric, clip=clip, stored=stored)
            scales.append(made.scales[:, 0])
            zeros.append(made.zeros[:, 0])
        part, local = w[start:end], factor[start:end, start:end]
        errors = torch.empty_like(part)
        for i in range(end - start):
            s, z = scales[of[start + i]], zeros[of[start + i]]
            code = (part[i] / s).round_().add_(z).clamp_(0, 2**bits - 1)
            codes[start + i] = code
            torch.sub(part[i], code.sub_(z).mul_(s), out=errors[i]).div_(pivots[start + i])
            part[i:].addr_(local[i, i:], errors[i], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    stored_codes = torch.empty_like(codes)
    stored_codes[order] = codes
    return stored_codes.t().contiguous(), Grid(torch.stack(scales, dim=1), torch.stack(zeros, dim=1), bits, size)


def _factor(h: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """U, upper triangular, with U^T U = (H + damping mean(diag H) I)^-1."""
    mean = torch.diagonal(h).mean()
    for _ in range(8):
        damped = h + damping * mean * torch.eye(len(h), device=h.device, dtype=h.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping = max(10 * damping, 1e-6)
    raise RuntimeError("the second moments of a layer's inputs are not finite or not positive: check the calibration data")


def rtn(
    weight: Float[Tensor, "out in"],
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = False,
    clip: bool = False,
    stored: torch.dtype = torch.float16,
) -> tuple[UInt8[Tensor, "out in"], Grid]:
    """Every number rounded to the nearest of its grid."""
    grid = find_grid(weight, bits, group, symmetric=symmetric, clip=clip, stored=stored)
    return grid.nearest(weight.float()), grid
