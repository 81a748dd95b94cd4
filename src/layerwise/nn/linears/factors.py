"""The best product of two thin matrices in place of one, as plain singular values see it or as the inputs do."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST = 1e-6
"""Added to an input's magnitude before its power is taken, so that an input that is never active divides nothing by zero."""
Kept = dict[bytes, tuple[Tensor, Tensor]]
"""Factors of matrices that were decomposed, by a digest of what was: of each those of the highest rank that was asked for."""


@torch.no_grad()
def svd_factors(
    weight: Float[Tensor, "out in"], rank: int, scales: Float[Tensor, " in"] | None = None, kept: Kept | None = None
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """B and A whose product is nearest to `weight`: ||(W - B A) diag(scales)||_F is the smallest that this rank allows.

    With W diag(s) = U S V^T these are B = U_r sqrt(S_r) and A = sqrt(S_r) V_r^T diag(1/s); what is lost is the sum of the squares of the
    singular values left out. Computed in float64, in the weight's dtype when returned.

    Args:
        scales: how much each input counts (`activation_scales`); None: all alike, the plain SVD.
        kept: looked up first, and added to. Factors of a lower rank are the first columns and rows of those of a higher one, bit for bit.

    Source: Eckart and Young 1936; with scales Yuan et al. 2023, "ASVD" (arXiv 2312.05821), section 3.
    """
    exact = weight.double() if scales is None else weight.double() * scales.double()
    key = b"" if kept is None else hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode() + exact.cpu().numpy().tobytes()).digest()
    if kept is not None and key in kept and kept[key][0].shape[1] >= rank:
        b, a = kept[key]
        return b[:, :rank], a[:rank]
    u, s, v = torch.linalg.svd(exact, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * v[:rank]
    made = b.to(weight.dtype), (a if scales is None else a / scales.double()).to(weight.dtype)
    if kept is not None:
        kept[key] = made
    return made


def activation_scales(magnitude: Float[Tensor, " in"], power: float = 0.5) -> Float[Tensor, " in"]:
    """How much each input counts: (its mean absolute value + 1e-6)^power. Source: ASVD's published code, alpha 0.5."""
    return (magnitude + SMALLEST) ** power
