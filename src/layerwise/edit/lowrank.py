"""Matrices of a trained model as products of two thin ones, and some entries of what these leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.analyze.importance import input_magnitudes
from layerwise.edit.adapt import Role
from layerwise.edit.linears import with_layers
from layerwise.edit.quantization.engine import calibration_rows
from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.linear import Dense
from layerwise.nn.linears.factors import Kept, activation_scales, svd_factors
from layerwise.nn.linears.lowrank import LowRank
from layerwise.nn.linears.sparse import SparseLowRank
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec

By = Literal["svd", "inputs", "random"]
Places = Literal["largest", "random"]


def factorize(
    model: Model,
    data: Any = None,
    kept: Kept | None = None,
    *,
    ratio: float | Sequence[float | None] | None = None,
    rank: int | Sequence[int | None] | None = None,
    by: By = "svd",
    residual: float | None = None,
    places: Places = "largest",
    roles: Sequence[Role] | None = None,
    least: int = 10,
    samples: int = 64,
    batch: int = 8,
    split: str = "train",
    seed: int | None = None,
) -> Model:
    """The model with W = B A in place of the matrices of its layers; what is not factorized is shared with the given model.

    A matrix (out, in) gets rank floor(out in / (ratio (out + in))), so that its factors have 1/ratio of its numbers or a little less: a
    square one a quarter of its width at ratio 2. One whose rank would be 0 stays as it is. Biases stay. Embedding,
    norms and head are not touched. The result trains, is saved and is described like any model; the edit `merge` multiplies out.
    With a residual W = B A + S, where S holds floor(residual out in) entries of W - B A in sparse form (`sparse-low-rank` linears).

    Args:
        kept: what matrices were decomposed into before, so that other ranks of them cost nothing; added to.
        ratio: how many times fewer numbers, of all layers or for each (None there: that layer stays).
        rank: of every matrix instead of a ratio (or all it has, if that is less), of all layers or for each.
        by: `svd`, the nearest product; `inputs`, the nearest as inputs are scaled (`layerwise.nn.linears.factors`), measured on
            `samples` rows of `split`, `batch` at a time; `random`, untrained factors (and entries) of the same shapes, for comparison.
        residual: share of the entries of W - B A that are kept, in (0, 1] (None: none); they come on top of the ratio.
        places: which: the `largest` in absolute value of each matrix, or at `random`.
        roles: which matrices (None: all). least: matrices with fewer outputs stay.
        seed: of the calibration rows, of random factors, and of random places.

    Raises:
        BadInput: neither or both of ratio and rank, values that mean nothing, lists of another length, or layers that are not dense.

    Source: Guo et al. 2024, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation" (arXiv 2310.10700), section 3.1; the
    residual: Han et al. 2024, "SLTrain" (arXiv 2406.02214), section 3, table 1.
    Queries, keys and values have matrices of their own here, as in its ALBEF; where one matrix holds all three (its DeiT and Swin) the
    same ratio gives one factor of rank 3/2 of these.
    """
    new = rebuilt(model, preview_factorize(model.spec, ratio=ratio, rank=rank, residual=residual, roles=roles, least=least))
    generator = torch.Generator(device=model.device).manual_seed(seed or 0)
    factored = {
        name: m for name, m in new.named_modules() if isinstance(m, LowRank | SparseLowRank) and type(model.get_submodule(name)) is Dense
    }
    scales = _scales(model, data, list(factored), samples, batch, split, seed or 0) if by == "inputs" else {}
    std = getattr(model.spec.stack, "init_std", 0.02)
    for name, module in factored.items():
        weight: Any = model.get_submodule(name).weight
        if by == "random":
            bias, module.bias = module.bias, None
            module.to_empty(device=weight.device).to(weight.dtype).initialize(std, generator)
            module.bias = bias
            continue
        b, a = svd_factors(weight.detach(), module.factor_a.shape[0], scales.get(name), kept)
        module.factor_a, module.factor_b = (nn.Parameter(t.clone(memory_format=torch.contiguous_format)) for t in (a, b))
        if isinstance(module, SparseLowRank):
            module.take_residual(weight, generator if places == "random" else None)
    return new


def preview_factorize(
    spec: ModelSpec,
    *,
    ratio: float | Sequence[float | None] | None = None,
    rank: int | Sequence[int | None] | None = None,
    residual: float | None = None,
    roles: Sequence[Role] | None = None,
    least: int = 10,
    **_: Any,
) -> ModelSpec:
    """What `factorize` makes of a model's description."""
    if (ratio is None) == (rank is None):
        raise BadInput(f"factorize needs a ratio or a rank, and not both; got {ratio} and {rank}")
    for value in ratio if isinstance(ratio, Sequence) else [ratio]:
        if value is not None and not value > 1:
            raise BadInput(f"ratio is how many times fewer numbers the factors have than the matrix, above 1; it is {value}")
    for value in rank if isinstance(rank, Sequence) else [rank]:
        if value is not None and value < 1:
            raise BadInput(f"rank is at least 1; it is {value}")
    if residual is not None and not 0 < residual <= 1:
        raise BadInput(f"residual is a share of a matrix's entries, in (0, 1]; it is {residual}")
    depth = spec.stack.depth + (spec.decoder.depth if spec.decoder is not None else 0)
    ratios, ranks = iter(_each(ratio, depth, "ratio")), iter(_each(rank, depth, "rank"))

    def thin(layer: LayerSpec) -> LayerSpec:
        c, r = next(ratios), next(ranks)
        if c is None and r is None:
            return layer
        other = [s.kind for s in layer.linears.values() if s.kind != "dense"]
        if other:
            raise BadInput(f"this model has {other[0]} linears; dense ones are factorized: merge them first (edit: merge)")
        linears = dict(layer.linears)
        for role, (outer, inner) in sizes(layer).items():
            kept = rank_for(outer, inner, c) if c is not None else min(int(r or 0), outer, inner)
            if kept and outer >= least and (roles is None or role in roles):
                linears[role] = LinearSpec("low-rank", rank=kept)
                if residual is not None:
                    if int(residual * outer * inner) < 1:
                        raise BadInput(f"residual {residual} keeps no entry of {role}, {outer} x {inner}: raise it, or leave it out")
                    linears[role] = LinearSpec("sparse-low-rank", rank=kept, density=residual)
        return dataclasses.replace(layer, linears=linears)

    made = with_layers(spec, thin, "factorize")
    stacks = [(before, after) for before, after in ((spec.stack, made.stack), (spec.decoder, made.decoder)) if before is not None]
    if all(before.layers == after.layers for before, after in stacks if after is not None):
        raise BadInput("factorize would leave every matrix as it is: give a smaller ratio, a smaller rank, or other roles")
    return made


def rank_for(outer: int, inner: int, ratio: float) -> int:
    """floor(out in / (ratio (out + in))): with it the two factors have at most 1/ratio of the matrix's numbers."""
    return int(outer * inner / (ratio * (outer + inner)))


def sizes(layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """Role -> (out, in) of every matrix of a resolved attention layer.

    Raises:
        BadInput: the layer mixes positions by something else.
    """
    if layer.mixer != "attention":
        raise BadInput(f"the matrices of attention layers are known by role; this layer's mixer is {layer.mixer}")
    width, size, ffn = layer.width, layer.head_dim, layer.ffn_width
    assert width and size and ffn and layer.kv_heads
    heads, kv = layer.heads * size, layer.kv_heads * size
    attention = {"q": (heads, width), "k": (kv, width), "v": (kv, width), "o": (width, heads)}
    found = {**attention, **({"gate": (ffn, width)} if layer.gated else {}), "up": (ffn, width), "down": (width, ffn)}
    return found | ({f"cross.{role}": shape for role, shape in attention.items()} if layer.cross else {})


def _each(value: Any, depth: int, what: str) -> list[Any]:
    """One value for each layer, an encoder's before a decoder's."""
    if not isinstance(value, Sequence):
        return [value] * depth
    if len(value) != depth:
        raise BadInput(f"{what} is one number, or one for each of {depth} layers; got {len(value)}")
    return list(value)


def _scales(model: Model, data: Any, names: list[str], samples: int, batch: int, split: str, seed: int) -> dict[str, Tensor]:
    """How much each input of the named linears counts, from its mean absolute value over the real positions of some rows."""
    if data is None:
        raise BadInput("factorize by inputs looks at data: give some, or use by: svd")
    rows = calibration_rows(data, samples, batch, split, 1, seed, model.device)
    found = input_magnitudes(model, {name: model.get_submodule(name) for name in names}, rows)
    # Only proportions matter, and a mean of 1 keeps the smallest addend small.
    return {name: activation_scales(size / size.mean().clamp(min=1e-12)) for name, size in found.items()}
