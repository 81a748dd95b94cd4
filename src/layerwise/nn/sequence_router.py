"""Deciding once a sequence, from its prompt, whether a layer runs.

Source: Jain et al. 2024, "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction" (arXiv 2410.12513). Its
printed training equation multiplies the layer's change in both terms, which would leave routers without a gradient from the task;
here rho multiplies it once. The routers' inner form is not published: here a linear map with a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from layerwise.nn.routers import Router
from layerwise.stack.parts_spec import RouterSpec

if TYPE_CHECKING:
    from layerwise.nn.cache import Slot
    from layerwise.stack.context import Context

Rows = Int[Tensor, " k"] | None
"""The rows of a batch that a layer runs; None: all of them."""

GATING = "gating"
"""The entry of `Context.extras` that holds a `Gating`."""


@dataclass
class Gating:
    """How the sequence routers act in one pass, and what they leave.

    Attributes:
        gate: `hard` runs a layer or not. `soft` mixes, token by token, its output and its input, rho layer(x) + (1 - rho) x.
            `straight-through` computes what `hard` does, with the gradient of the mean rho.
        decisions: layer -> (b,) whether each row runs it; with them, no router is asked.
        threshold: in place of the routers' own.
        rho: layer -> (b, s), where the gate is not hard. means: layer -> (b,) mean rho of the prompt, wherever a router was asked.
    """

    gate: Literal["hard", "soft", "straight-through"] = "hard"
    decisions: Mapping[int, Bool[Tensor, " b"]] | None = None
    threshold: float | None = None
    rho: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)


class SequenceRouter(Router):
    """A layer runs for a sequence if the mean of rho over its prompt is above a threshold, rho = sigmoid(logit / temperature).

    The decision is made where the prompt is read and kept in the cache; a sequence that skips the layer has no keys and values there.
    The prompt is what `Context.prompt` marks; else what the first pass over a cache reads; else everything. Padding has no say.
    """

    def __init__(self, width: int, spec: RouterSpec) -> None:
        super().__init__(width, spec)
        self.spec = spec

    def gated(
        self, x: Float[Tensor, "b s width"], ctx: Context, slot: Slot, layer: Callable[[Tensor, Context, Slot], Tensor]
    ) -> Float[Tensor, "b s width"]:
        """What the routed `layer` makes of the stream."""
        gating: Gating = ctx.extras.get(GATING) or Gating()
        if gating.gate != "hard":
            return self._mixed(x, ctx, slot, layer, gating)
        begun = ctx.cache is not None and slot in ctx.cache.decisions
        rows = ctx.cache.decisions[slot] if begun and ctx.cache is not None else self._decided(x, ctx, slot, gating)
        if rows is None:
            return layer(x, ctx, slot)
        if self.spec.full_prefill and not begun:
            whole = layer(x, ctx, slot)
            if ctx.cache is not None:
                ctx.cache.keep(slot, rows)
            stays = prompt_of(ctx, x.shape[1]).expand(x.shape[:2]).index_fill(0, rows, True)
            return torch.where(stays[..., None], whole, x)
        return x.index_copy(0, rows, layer(x[rows], ctx.rows(rows), slot)) if len(rows) else x

    def rho(self, x: Float[Tensor, "b s width"]) -> Float[Tensor, "b s"]:
        logits = self(x)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.spec.temperature)

    def mean(self, rho: Float[Tensor, "b s"], ctx: Context) -> Float[Tensor, " b"]:
        """Over the prompt."""
        weight = prompt_of(ctx, rho.shape[1]).expand(rho.shape).to(rho.dtype)
        return (rho * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def _decided(self, x: Tensor, ctx: Context, slot: Slot, gating: Gating) -> Rows:
        if gating.decisions is not None:
            runs = gating.decisions[slot[0]].to(x.device)
        else:
            mean = gating.means[slot[0]] = self.mean(self.rho(x), ctx)
            runs = mean > (self.spec.threshold if gating.threshold is None else gating.threshold)
        chosen = runs.nonzero().squeeze(1)
        rows = None if len(chosen) == len(runs) else chosen
        if ctx.cache is not None:
            ctx.cache.decisions[slot] = rows
        return rows

    def _mixed(self, x: Tensor, ctx: Context, slot: Slot, layer: Callable[..., Tensor], gating: Gating) -> Tensor:
        rho = gating.rho[slot[0]] = self.rho(x)
        mean = gating.means[slot[0]] = self.mean(rho, ctx)
        weight = rho if gating.gate == "soft" else ((mean > self.spec.threshold) + (mean - mean.detach()))[:, None]
        return torch.lerp(x, layer(x, ctx, slot), weight[..., None].to(x.dtype))


def prompt_of(ctx: Context, length: int) -> Bool[Tensor, "b s"]:
    """Which of the `length` positions of a pass are of the prompt, (1 or b, s); padding is not."""
    assert ctx.positions is not None
    valid: Any = ctx.positions >= 0
    if ctx.prompt is not None:
        return valid & ctx.prompt
    if ctx.cache is None:
        return valid
    places = torch.arange(ctx.cache.length - length, ctx.cache.length, device=valid.device)
    return valid & (places < ctx.cache.first)
