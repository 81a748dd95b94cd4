"""Normalization layers, by name."""

from __future__ import annotations

from typing import Any

from torch import nn


def make_norm(kind: str, width: int, eps: float, bias: bool = True) -> nn.Module:
    """A norm over the last axis: (..., width) -> (..., width)."""
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    return nn.RMSNorm(width, eps=eps)


def fill_norm(norm: Any, gain: float) -> None:
    """Set a norm to its initial state: every gain `gain`, every shift 0."""
    nn.init.constant_(norm.weight, gain)
    if getattr(norm, "bias", None) is not None:
        nn.init.zeros_(norm.bias)
