"""How much each calibration token counts: by the attention it receives, and by other measures."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from layerwise.stack.context import PAD, Context
from layerwise.stack.record import Recorder

Tokens = Literal["attention", "first", "first-last", "norm", "change", "distance", "rare", "random"]


def attention_received(layer: Any, x: Float[Tensor, "b s width"], ctx: Context, index: int) -> Float[Tensor, "b s"]:
    """r_j = sum over heads and queries of the probability that key j is looked at; sums to heads times length in every row.

    Queries at padding do not count.
    """
    recorder = Recorder(keep_attention=frozenset({index}))
    layer(x, dataclasses.replace(ctx, recorder=recorder), (index, 0))
    seen = recorder.attention[index].float().sum(dim=1)
    if ctx.positions is not None:
        seen = seen * (ctx.positions != PAD)[..., None]
    return seen.sum(dim=1)


def token_scores(
    kind: Tokens,
    layer: Any,
    x: Float[Tensor, "b s width"],
    ctx: Context,
    index: int,
    ids: Int[Tensor, "b s"] | None,
    frequency: Int[Tensor, " vocab"] | None,
    generator: torch.Generator,
) -> Float[Tensor, "b s"]:
    """The importance of every token for a layer that reads `x`.

    `attention`: received in this layer; `first`, `first-last`: 1 on the first eighth, or the first and last 1/32, of a row, else 0;
    `norm`: of x; `change`: the layer changes x little; `distance`: mean squared distance to the row's other tokens; `rare`: seldom in the
    calibration text; `random`: a control.
    """
    b, s = x.shape[:2]
    if kind == "attention":
        return attention_received(layer, x, ctx, index)
    if kind in ("first", "first-last"):
        place = torch.arange(s, device=x.device)
        chosen = place < max(s // 8, 1) if kind == "first" else (place < max(s // 32, 1)) | (place >= s - max(s // 32, 1))
        return chosen.float().expand(b, s)
    if kind == "norm":
        return x.float().norm(dim=-1)
    if kind == "change":
        return -(layer(x, ctx, (index, 0)).float() - x.float()).norm(dim=-1)
    if kind == "distance":
        return torch.cdist(x.float(), x.float()).square().mean(dim=-1)
    if kind == "rare":
        assert ids is not None and frequency is not None
        return -frequency.to(x.device)[ids].float()
    return torch.rand(b, s, generator=generator).to(x.device)


def token_weights(
    scores: Float[Tensor, "b s"], real: Bool[Tensor, "b s"] | None = None, *, floor: float = 0.01, exponent: float = 1.0
) -> Float[Tensor, "b s"]:
    """Scores stretched to [floor, 1] row by row, raised to `exponent` and divided by their mean over the row's real tokens.

    Rows whose scores are all equal weigh all tokens alike. Multiplying scores by a positive number changes nothing.
    Source: Sung et al. 2025, "RSQ" (arXiv 2503.01820), published code (exponent 1; weighting features instead of squares is 2).
    """
    real = torch.ones_like(scores, dtype=torch.bool) if real is None else real.expand(scores.shape)
    low = scores.masked_fill(~real, float("inf")).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~real, float("-inf")).amax(dim=1, keepdim=True)
    spread = high - low
    stretched = torch.where(spread > 0, (scores - low) / spread.clamp(min=1e-30), torch.ones_like(scores)).clamp(0, 1)
    weights = ((floor + (1 - floor) * stretched) ** exponent).masked_fill(~real, 0.0)
    return weights * real.sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1e-30)
