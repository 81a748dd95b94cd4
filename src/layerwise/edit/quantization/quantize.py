"""Quantizing the matrices of a model's layers, packed: rounding, what is done before it, and how many bits each layer gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch

from layerwise.analyze.scores import By, layer_order
from layerwise.edit.linears import with_layers
from layerwise.edit.quantization.allocation import allocate
from layerwise.edit.quantization.engine import Quantized, quantized_layers, recipe_of
from layerwise.edit.quantization.rotation import Rotation, preview_rotate
from layerwise.edit.quantization.rotation import rotate as turn
from layerwise.edit.quantization.scaling import Clip, Scale
from layerwise.edit.quantization.tokens import Tokens
from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.integers import WIDTHS
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec, StackSpec


def quantize(
    model: Model,
    data: Any = None,
    *,
    bits: int | Sequence[int] = 4,
    method: Literal["rtn", "gptq"] = "gptq",
    group: int | None = None,
    symmetric: bool = False,
    clip: Clip = False,
    act_order: bool = False,
    damping: float = 0.01,
    rotate: Rotation | None = None,
    scale: Scale | None = None,
    propagate: float = 0.0,
    propagate_damping: float = 1.0,
    propagate_down: bool = False,
    tokens: Tokens | None = None,
    floor: float = 0.01,
    exponent: float = 1.0,
    shifts: int = 1,
    low_bits: int | None = None,
    mean_bits: float | None = None,
    by: By = "input-modification",
    reverse: bool = False,
    samples: int = 64,
    batch: int = 8,
    split: str = "train",
    spill: bool = False,
    seed: int | None = None,
) -> Model:
    """The model with the matrices of its layers in 2, 3, 4 or 8 bits, packed and frozen; embedding, norms and head stay as they are.

    Of a low-rank matrix (edit: factorize) both factors are quantized, the second one on what the first makes of the inputs.

    Args:
        bits: of every layer, or a list with those of each; 16 leaves a layer as it is.
        method: `rtn` rounds to nearest; `gptq` moves each column's error to later ones.
        group, symmetric, clip: of the grids, see `layerwise.nn.integers.find_grid`; clip: `awq` searches the ranges that change outputs
            least (`layerwise.edit.quantization.scaling.clipped`). act_order, damping: of GPTQ.
        rotate: turn the residual stream first (`layerwise.edit.quantization.rotation`).
        scale: AWQ's scales of inputs, searched on the weights that are rounded (`layerwise.edit.quantization.scaling`): `awq` by what
            matrices give, `awq-branch` by what the attention and the feed-forward give.
        propagate: strength of QEP's correction for the error that inputs carry, 0 to 1; its damping; and whether the feed-forward's
            second matrix is corrected as well.
        tokens: what a token's weight in the second moments comes from; floor, exponent: see `token_weights`; shifts: every row is
            also used turned around so many times (RSQ).
        low_bits, mean_bits: give the more important layers `bits` and the others `low_bits`, `mean_bits` on average; by: the score that
            says which (`layerwise.analyze.scores`); reverse: the other way around.
        samples, batch, split, seed: calibration rows, drawn with the seed; spill: their activations lie on disk.

    Raises:
        BadInput: see `preview_quantize`.
    """
    options = {k: v for k, v in locals().items() if k not in ("model", "data")}
    planned = preview_quantize(model.spec, **options)
    seed = seed or 0
    each = _plan(model.spec, bits, low_bits, mean_bits)
    if low_bits is not None:
        assert isinstance(bits, int) and mean_bits is not None
        order = layer_order(model, data, by, reverse=reverse, samples=samples, split=split, seed=seed)
        each = allocate(order, bits, low_bits, mean_bits)
        planned = _packed(preview_rotate(model.spec) if rotate else model.spec, each, group)
    recipe = recipe_of(**options)
    turned = model if rotate is None else turn(model, kind=rotate, seed=seed)
    new = rebuilt(turned, planned)
    layers = quantized_layers(turned, data, each, recipe, samples=samples, batch=batch, split=split, spill=spill, seed=seed)
    for i, made in enumerate(layers):
        put(new.stack.layers[i], made)
    return new


@torch.no_grad()
def put(layer: Any, made: Quantized) -> None:
    """Give a layer with packed matrices what the engine made of it."""
    if not made.codes:
        return
    dropped = {f"{side}.branch.{role}{end}" for side, role in made.codes for end in ("", ".weight")}
    kept = {name: tensor for name, tensor in made.layer.state_dict().items() if name not in dropped}
    layer.load_state_dict(kept, strict=False, assign=True)
    for (side, role), (codes, grid) in made.codes.items():
        module = layer.get_submodule(f"{side}.branch.{role}")
        getattr(module, "base", module).put(codes, grid)  # a factor holds its numbers itself


def preview_quantize(
    spec: ModelSpec,
    *,
    bits: int | Sequence[int] = 4,
    group: int | None = None,
    rotate: Rotation | None = None,
    scale: str | None = None,
    propagate: float = 0.0,
    tokens: Tokens | None = None,
    method: str = "gptq",
    clip: Clip = False,
    low_bits: int | None = None,
    mean_bits: float | None = None,
    **_: Any,
) -> ModelSpec:
    """What `quantize` makes of a model's description (when a score chooses: one with as many layers of each width).

    Raises:
        BadInput: bits that there are not, a model whose layers are not run one by one, or matrices that are not dense.
    """
    if tokens is not None and method == "rtn" and not propagate and clip != "awq":
        raise BadInput("tokens weighs second moments, which rtn does not use: set method: gptq, clip: awq or propagate")
    if clip == "awq" and method != "rtn":
        raise BadInput(
            "clip: awq cuts weights off before they are rounded to nearest; gptq searches ranges itself: set method: rtn or clip: true"
        )
    if not 0 <= propagate <= 1:
        raise BadInput(f"propagate is a strength from 0 to 1; it is {propagate}")
    thin = any(
        linear.kind == "low-rank" for layer in getattr(spec.stack, "layers", ()) for linear in getattr(layer, "linears", {}).values()
    )
    if thin and (rotate is not None or scale is not None or propagate or clip == "awq"):
        raise BadInput("rotate, scale, propagate and clip: awq change dense matrices; this model has low-rank linears: leave them out")
    return _packed(preview_rotate(spec) if rotate else spec, _plan(spec, bits, low_bits, mean_bits), group)


def _plan(spec: ModelSpec, bits: int | Sequence[int], low: int | None, mean: float | None) -> list[int]:
    """Bits of each layer; where a score chooses, as if the first layers were the important ones."""
    depth = spec.stack.depth
    if (low is None) != (mean is None):
        raise BadInput("low_bits and mean_bits are given together")
    if low is not None and mean is not None:
        if not isinstance(bits, int):
            raise BadInput("bits is one number, the higher one, where low_bits and mean_bits share them out")
        return allocate(range(depth), bits, low, mean)
    each = [bits] * depth if isinstance(bits, int) else list(bits)
    if len(each) != depth:
        raise BadInput(f"bits is one number, or one for each of {depth} layers; got {len(each)}")
    return each


def _packed(spec: ModelSpec, bits: Sequence[int], group: int | None) -> ModelSpec:
    bad = [b for b in bits if b not in (*WIDTHS, 16)]
    if bad:
        raise BadInput(f"layers are quantized to {', '.join(map(str, WIDTHS))} bits, or left as they are with 16; got {bad[0]}")
    if group is not None and group < 1:
        raise BadInput(f"group is the number of inputs that share a scale, at least 1; it is {group}")
    if not isinstance(spec.stack, StackSpec) or spec.decoder is not None or spec.stack.shared:
        raise BadInput("quantize walks one stack of transformer layers that have weights of their own")
    count = iter(bits)

    def packed(layer: LayerSpec) -> LayerSpec:
        width = next(count)
        if width == 16:
            return layer
        other = [s.kind for s in layer.linears.values() if s.kind not in ("dense", "low-rank")]
        if other or layer.cross or layer.mixer != "attention":
            raise BadInput(f"quantize begins from dense attention layers; this model has {other[0] if other else 'others'} (edit: merge)")
        assert layer.width is not None
        thin = {
            role: dataclasses.replace(s, kind="packed-low-rank", bits=width, group=group)
            for role, s in layer.linears.items()
            if s.kind == "low-rank"
        }
        return dataclasses.replace(layer, linears={"*": LinearSpec("packed", bits=width, group=group), **thin}).resolve(0, 1, layer.width)

    return with_layers(spec, packed, "quantize")
