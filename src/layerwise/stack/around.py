"""Callables that wrap a layer's call, in the form `around(i, layer, x, ctx, call) -> x`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.stack.context import Call, Context


class StochasticDepth:
    """Each sample skips layer `i` with probability p in training; the branch of those that run is scaled by 1/(1 - p).

    Skipped samples cost nothing: the layer runs on the others only. Source: Huang et al. 2016, "Deep Networks with
    Stochastic Depth", with the scaling at training time that keeps inference unchanged.

    Args:
        rates: p for each layer; None reads `layer.spec.drop`.
        scale: False leaves the branch as it is, as Elhoushi et al. 2024, "LayerSkip" (section 4.1.1), do.
    """

    def __init__(self, rates: list[float] | None = None, *, scale: bool = True) -> None:
        self.rates, self.scale = rates, scale

    def __call__(self, i: int, layer: Any, x: Float[Tensor, "b ..."], ctx: Context, call: Call) -> Tensor:
        rate = layer.spec.drop if self.rates is None else self.rates[i]
        if not rate or not layer.training:
            return call(x, ctx)
        kept = torch.nonzero(torch.rand(x.shape[0], device=x.device) >= rate).flatten()
        if not len(kept):
            return x
        if not self.scale:
            return x.index_copy(0, kept, call(x[kept], ctx.rows(kept)))
        inside = x[kept]
        change = (call(inside, ctx.rows(kept)) - inside) / (1 - rate)
        return x.index_add(0, kept, change)
