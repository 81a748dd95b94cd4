"""Spherical interpolation of weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PARALLEL = 0.9995
"""Cosine beyond which two directions count as one."""


def slerp(a: Float[Tensor, ...], b: Float[Tensor, ...], t: float = 0.5) -> Float[Tensor, ...]:
    """(sin((1 - t) w) a + sin(t w) b) / sin(w), w the angle between the two tensors as vectors; linear where they are nearly parallel.

    Computed in float64. Source: Shoemake 1985, "Animating Rotation with Quaternion Curves", section 3.3.
    """
    x, y = a.detach().double(), b.detach().double()
    cosine = (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-300)
    if cosine.abs() > PARALLEL:
        return torch.lerp(x, y, t).to(a.dtype)
    angle = torch.arccos(cosine)
    return ((torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)).to(a.dtype)
