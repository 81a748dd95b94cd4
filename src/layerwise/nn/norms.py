"""Normalization layers, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ZeroRMSNorm(nn.Module):
    """RMSNorm whose gain is 1 + weight, so that weight decay pulls the gain to 1 and not to 0. Source: Gemma's published code.

    Half-precision inputs are normalized and scaled in float32, as there.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.weight.shape, 1.0 + self.weight.to(dtype), self.eps).to(x.dtype)


class Gain(nn.Module):
    """Learned factors, one for each of `groups` equal groups of channels: (..., width) -> (..., width)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups))

    def forward(self, x: Tensor) -> Tensor:
        groups = len(self.weight)
        if groups == x.shape[-1]:
            return x * self.weight
        return (x.unflatten(-1, (groups, -1)) * self.weight[:, None]).flatten(-2)


def make_norm(kind: str, width: int, eps: float, bias: bool = True) -> nn.Module:
    """A norm over the last axis: (..., width) -> (..., width)."""
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    if kind == "rmsnorm_zero":
        return ZeroRMSNorm(width, eps)
    return nn.RMSNorm(width, eps=eps)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is one of the norms and gains that `fill_norm` sets."""
    return isinstance(module, nn.RMSNorm | nn.LayerNorm | ZeroRMSNorm | Gain)


def fill_norm(norm: Any, gain: float) -> None:
    """Set a norm to its initial state: every gain `gain`, every shift 0."""
    nn.init.constant_(norm.weight, gain - 1.0 if isinstance(norm, ZeroRMSNorm) else gain)
    if getattr(norm, "bias", None) is not None:
        nn.init.zeros_(norm.bias)
