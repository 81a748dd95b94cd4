"""The best product of two thin matrices in place of one, as plain singular values see it or as the inputs do."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST = 1e-6
"""Added to an input's magnitude before its power is taken, so that an input that is never active divides nothing by zero."""


@torch.no_grad()
def svd_factors(
    weight: Float[Tensor, "out in"], rank: int, scales: Float[Tensor, " in"] | None = None
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """B and A whose product is nearest to `weight`: ||(W - B A) diag(scales)||_F is the smallest that this rank allows.

    With W diag(s) = U S V^T these are B = U_r sqrt(S_r) and A = sqrt(S_r) V_r^T diag(1/s); what is lost is the sum of the squares of the
    singular values left out. Computed in float64, in the weight's dtype when returned.

    Args:
        scales: how much each input counts (`activation_scales`); None: all alike, the plain SVD.

    Source: Eckart and Young 1936; with scales Yuan et al. 2023, "ASVD" (arXiv 2312.05821), section 3.
    """
    exact = weight.double() if scales is None else weight.double() * scales.double()
    u, s, v = torch.linalg.svd(exact, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * v[:rank]
    return b.to(weight.dtype), (a if scales is None else a / scales.double()).to(weight.dtype)


def activation_scales(magnitude: Float[Tensor, " in"], power: float = 0.5) -> Float[Tensor, " in"]:
    """How much each input counts: (its mean absolute value + 1e-6)^power. Source: ASVD's published code, alpha 0.5."""
    return (magnitude + SMALLEST) ** power
