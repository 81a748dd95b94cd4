"""AWQ: inputs that are large get larger weights, so that rounding hurts them less; what makes the inputs is divided by as much.

Its second search, for ranges that cut off the largest weights, is here as well.
Source: Lin et al. 2023, "AWQ" (arXiv 2306.00978), and published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from layerwise.edit.quantization.gptq import rtn
from layerwise.edit.quantization.moments import Moments
from layerwise.edit.quantization.passage import GROUPS, Passage
from layerwise.nn.norms import ZeroRMSNorm

Scale = Literal["awq", "awq-branch"]
Clip = bool | Literal["awq"]
Change = Callable[[Sequence[Tensor]], float]
"""Sum of squares of what outputs change by when the matrices of a group are these instead."""
STEPS = 20
CUTS = 10
"""Ranges that are tried: 1, 19/20, ... 11/20 of the largest magnitude."""


def scale_layer(at: Passage, measure: Scale, **grid: Any) -> None:
    """Scale the matrices of a layer, in place, as far as what comes before them can be divided: its function stays.

    Args:
        measure, grid: see `scale_group`.
    """
    groups = [at.group(side, roles) for side, roles in GROUPS]
    moments = at.moments(*(list(linears.values())[-1] for linears in groups))
    for linears, read in zip(groups, moments, strict=True):
        matrices = {role: linear.weight.detach() for role, linear in linears.items()}
        scale = scale_group(at, linears, matrices, read, measure, **grid)
        if scale is not None:
            for role, linear in linears.items():
                linear.weight.data = matrices[role] * scale.to(linear.weight.dtype)


def scale_group(
    at: Passage, linears: dict[str, Any], matrices: dict[str, Tensor], moments: Moments, measure: Scale, **grid: Any
) -> Float[Tensor, " in"] | None:
    """The scale that a group's matrices are to be multiplied by, with what comes before them divided by it, in place.

    None if what comes before cannot be divided.

    Args:
        linears: of the group; matrices: what they are to hold, which need not be what they do.
        moments: of what they read. measure: `awq` asks what rounding does to the outputs of the matrices; `awq-branch`, as the published
            code, of q, k, v to those of the whole attention and of gate, up to those of the whole feed-forward.
        grid: how matrices will be rounded (`find_grid`); the search rounds without clipping.
    """
    source = source_of(at.layer, list(linears)[-1])
    if source is None:
        return None
    weights = list(matrices.values())
    if measure == "awq-branch" and "o" not in linears and "down" not in linears:
        change = branch_change(at, linears, weights)
    else:
        change = matrix_change(weights, moments.hessian)
    scale = best_scale(weights, moments.size, change, **grid)
    divide(source, scale)
    return scale


def source_of(layer: Any, role: str) -> Any:
    """What makes the inputs of a group of matrices (`role` is its last) and can be divided without changing what the layer computes.

    Of q, k, v and of gate, up the norm before them; of o the matrix v where every head has its own; of down the matrix up in gated
    feed-forwards. None for the others.
    """
    spec, attention, ffn = layer.spec, layer.mixer.branch, layer.ffn.branch
    before = spec.placement not in ("post", "deepnorm")
    sources = {
        "v": layer.mixer.norm if before else None,
        "o": attention.v if spec.kv_heads == spec.heads else None,
        "up": layer.ffn.norm if before else None,
        "down": ffn.up if spec.gated and ffn.norm is None else None,
    }
    return sources[role]


@torch.no_grad()
def divide(source: Any, scale: Float[Tensor, " out"]) -> None:
    """Divide what a norm or a linear gives, in place, by one number a channel."""
    scale = scale.to(source.weight.dtype)
    if isinstance(source, ZeroRMSNorm):
        source.weight.copy_((1 + source.weight) / scale - 1)
    else:
        source.weight.div_(scale if source.weight.dim() == 1 else scale[:, None])
    if getattr(source, "bias", None) is not None:
        source.bias.div_(scale)


def best_scale(weights: Sequence[Float[Tensor, "out in"]], size: Float[Tensor, " in"], change: Change, **grid: Any) -> Float[Tensor, " in"]:
    """Of s = size^a, a = 0, 1/20, ... 19/20, the one with which rounding W s and dividing by s changes the outputs least (equation 5).

    Args:
        size: mean magnitude of each input, in any unit. change: of which outputs. grid: how matrices will be rounded (`find_grid`).
    """
    size = size / size.mean()
    best, least = torch.ones_like(size), float("inf")
    for step in range(STEPS):
        scale = size.clamp(min=1e-4) ** (step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        made = [rtn(weight.float() * scale, **grid | {"clip": False}) for weight in weights]
        error = change([grid.values(codes) / scale for codes, grid in made])
        if error < least:
            best, least = scale, error
    return best


def matrix_change(weights: Sequence[Float[Tensor, "out in"]], hessian: Float[Tensor, "in in"]) -> Change:
    """The change of what the matrices themselves give, from the second moments of their inputs."""

    def change(rounded: Sequence[Tensor]) -> float:
        moved = [made - weight.float() for made, weight in zip(rounded, weights, strict=True)]
        return sum(float(((m @ hessian) * m).sum()) for m in moved)

    return change


def branch_change(at: Passage, linears: dict[str, Any], weights: Sequence[Float[Tensor, "out in"]]) -> Change:
    """The change of what the attention gives whose q, k, v, or the feed-forward whose gate, up these are.

    Inputs and outputs of the branch are kept for all batches meanwhile. The linears are left with what was put into them last.
    """
    attends = "q" in linears
    branch = (at.layer.mixer if attends else at.layer.ffn).branch
    entered = [at.read(i, next(iter(linears.values())))[0] for i in range(len(at.stream))]

    def run(matrices: Sequence[Tensor]) -> Iterator[Tensor]:
        for linear, matrix in zip(linears.values(), matrices, strict=True):
            linear.weight.data = matrix.to(linear.weight.dtype)
        for i, x in enumerate(entered):
            made = (branch(x, at.contexts[i], (at.index, 0)) if attends else branch(x)).float()
            yield made if (real := at.real(i)) is None else made * real[..., None]

    true = list(run(weights))
    return lambda rounded: sum(float((made - given).square().sum()) for made, given in zip(run(rounded), true, strict=True))


def clipped(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], bits: int, group: int | None = None, **grid: Any
) -> Float[Tensor, "out in"]:
    """Every row, or group of a row, cut off at the share of its largest magnitude with which rounding changes its outputs least.

    Args:
        hessian: second moments of the inputs, in any unit; of groups, only those among a group's own inputs count.
    """
    width, size = weight.shape[1], group or weight.shape[1]
    short = -width % size
    blocks = F.pad(weight.float(), (0, short)).unflatten(1, (-1, size))
    moments = F.pad(hessian, (0, short, 0, short)).unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2)
    largest = blocks.abs().amax(dim=2, keepdim=True)
    best, least = blocks, torch.full_like(largest, float("inf"))
    for step in range(CUTS):
        limit = largest * (1 - step / STEPS)
        tried = blocks.clamp(-limit, limit)
        codes, made = rtn(tried.flatten(1), bits, size, **grid)
        change = made.values(codes).view_as(blocks) - blocks
        error = torch.einsum("ogi,ijg,ogj->og", change, moments, change)[..., None]
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.flatten(1)[:, :width].to(weight.dtype)
