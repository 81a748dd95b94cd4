"""Making an encoder binary, and packing a binary one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from layerwise.edit.linears import with_layers
from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.binarize import Elastic
from layerwise.nn.binary_attention import Estimators
from layerwise.nn.linears.binary import Binary
from layerwise.stack.spec import LayerSpec, LinearSpec


def binarize(model: Model, *, estimator_rank: int = 1, seed: int | None = None) -> Model:
    """The encoder with one-bit matrices, activations and attention, begun from its full-precision weights, which it shares.

    Args:
        estimator_rank: of the full-precision estimates of what binarization leaves out (0: none).
        seed: of the estimators.

    Source: Xing et al. 2024, "BiPFT", whose student begins from its teacher's weights.
    """
    new = rebuilt(model, preview_binarize(model.spec, estimator_rank=estimator_rank))
    generator = torch.Generator(device=model.device).manual_seed(seed or 0)
    for module in new.modules():
        if isinstance(module, Binary):
            module.shift = nn.Parameter(torch.empty_like(module.shift, device=model.device))
            module.inputs.to_empty(device=model.device)
            module.reset_inputs(generator)
        elif isinstance(module, Elastic | Estimators):
            module.to_empty(device=model.device)
            module.initialize(model.spec.stack.init_std, generator)  # type: ignore[union-attr]
    return new


def preview_binarize(spec: ModelSpec, *, estimator_rank: int = 1, **_: Any) -> ModelSpec:
    """What `binarize` makes of a model's description."""

    def binary(layer: LayerSpec) -> LayerSpec:
        if any(s.kind != "dense" for s in layer.linears.values()) or layer.mixer != "attention":
            raise BadInput("binarize begins from dense attention layers: merge the linears first (edit: merge)")
        if layer.causal or layer.cross or layer.kv_heads != layer.heads or layer.position not in ("none", "relative"):
            raise BadInput("binarize is for encoders without causal, cross, grouped or rotary attention (preset bert)")
        changed = dataclasses.replace(layer, mixer="binary-attention", estimator_rank=estimator_rank, linears={"*": LinearSpec("binary")})
        return changed.resolve(0, 1, layer.width or 1)

    return with_layers(spec, binary, "binarize")


def pack_binary(model: Model) -> Model:
    """The model with its binary matrices packed eight weights to a byte: same outputs, matrices frozen."""
    new = rebuilt(model, preview_pack(model.spec))
    for name, module in model.named_modules():
        if isinstance(module, Binary):
            target: Any = new.get_submodule(name)
            target.take(module)
    return new


def preview_pack(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `pack_binary` makes of a model's description."""

    def packed(layer: LayerSpec) -> LayerSpec:
        if not any(s.kind == "binary" for s in layer.linears.values()):
            raise BadInput("pack-binary packs linears of kind binary; this model has none (edit: binarize)")
        linears = {r: dataclasses.replace(s, kind="binary-packed") if s.kind == "binary" else s for r, s in layer.linears.items()}
        return dataclasses.replace(layer, linears=linears)

    return with_layers(spec, packed, "pack-binary")
