"""AWQ: inputs that are large get larger weights, so that rounding hurts them less; what makes the inputs is divided by as much."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.edit.quantization.gptq import rtn
from layerwise.nn.norms import ZeroRMSNorm

STEPS = 20


@torch.no_grad()
def scale_layer(layer: Any, hessians: dict[str, Float[Tensor, "in in"]], sizes: dict[str, Float[Tensor, " in"]], **grid: Any) -> None:
    """Scale the matrices of a layer, in place, as far as what comes before them can be divided: the function stays.

    q, k, v and gate, up behind a norm; o behind v where every head has its own; down behind up in gated feed-forwards.

    Args:
        hessians, sizes: for q, o, up and down: second moments and mean magnitudes of their inputs.
        grid: how the matrices will be rounded (`find_grid`); the search rounds without clipping.
    """
    spec, attention, ffn = layer.spec, layer.mixer.branch, layer.ffn.branch
    before = spec.placement not in ("post", "deepnorm")
    if before:
        _scale([attention.q, attention.k, attention.v], layer.mixer.norm, hessians["q"], sizes["q"], grid)
    if spec.kv_heads == spec.heads:
        _scale([attention.o], attention.v, hessians["o"], sizes["o"], grid)
    if before:
        _scale([m for m in (ffn.gate, ffn.up) if m is not None], layer.ffn.norm, hessians["up"], sizes["up"], grid)
    if spec.gated and ffn.norm is None:
        _scale([ffn.down], ffn.up, hessians["down"], sizes["down"], grid)


def _scale(linears: list[Any], source: Any, hessian: Tensor, size: Tensor, grid: dict[str, Any]) -> None:
    scale = best_scale([m.weight for m in linears], hessian, size, **grid)
    for linear in linears:
        linear.weight.mul_(scale.to(linear.weight.dtype))
    divide(source, scale)


def divide(source: Any, scale: Float[Tensor, " out"]) -> None:
    """Divide what a norm or a linear gives, in place, by one number a channel."""
    scale = scale.to(source.weight.dtype)
    if isinstance(source, ZeroRMSNorm):
        source.weight.copy_((1 + source.weight) / scale - 1)
    else:
        source.weight.div_(scale if source.weight.dim() == 1 else scale[:, None])
    if getattr(source, "bias", None) is not None:
        source.bias.div_(scale)


def best_scale(
    weights: list[Float[Tensor, "out in"]], hessian: Float[Tensor, "in in"], size: Float[Tensor, " in"], **grid: Any
) -> Float[Tensor, " in"]:
    """Of s = size^a, a = 0, 1/20, ... 19/20, the one with which rounding W s and dividing by s changes the outputs least.

    Source: Lin et al. 2023, "AWQ" (arXiv 2306.00978), equation 5 and published code, which measures the change behind the whole block;
    here it is that of the matrices themselves.
    """
    best, least = torch.ones_like(size), float("inf")
    for step in range(STEPS):
        scale = size.clamp(min=1e-4) ** (step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight in weights:
            codes, made = rtn(weight.float() * scale, **grid)
            change = made.values(codes) / scale - weight.float()
            error += float(((change @ hessian) * change).sum())
        if error < least:
            best, least = scale, error
    return best
