"""Layer rotation: how far a layer's weights have turned away from where they began.

Source: Carbonnelle and De Vleeschouwer 2018, "Layer rotation: a surprisingly powerful indicator of generalization in deep
networks?" (arXiv 1806.01603), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwise.stack.depth import depth_of
from layerwise.stack.sharding import whole


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """1 - cosine of the angle between two tensors taken as vectors: 0 same direction, 1 orthogonal, 2 opposite."""
    x, y = a.flatten().double(), b.flatten().double()
    return (1 - (x @ y) / (x.norm() * y.norm()).clamp(min=torch.finfo(torch.float64).tiny)).item()


def kernels_by_depth(model: nn.Module) -> dict[int, Tensor]:
    """The weights of each depth as one vector (a copy): parameters with two dimensions or more; norms and biases do not count."""
    depths = depth_of(model)
    parts: dict[int, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parts.setdefault(depths[name], []).append(whole(parameter.detach()).flatten())
    return {i: torch.cat(p) for i, p in sorted(parts.items())}


def rotation(before: dict[int, Tensor], after: dict[int, Tensor]) -> dict[int, float]:
    """Cosine distance of each depth's weights between two snapshots of `kernels_by_depth`; changed shapes are left out."""
    return {i: cosine_distance(w, after[i]) for i, w in before.items() if i in after and after[i].shape == w.shape}


def step_rotation(distance: float) -> float:
    """Tangent of the angle whose cosine distance is given: what one Layca step of that rho turns a layer by."""
    return max(1 / (1 - distance) ** 2 - 1, 0.0) ** 0.5
