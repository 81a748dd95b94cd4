"""Changing how a model's matrices are stored: packed in 4 bits, or dense again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerwise.embed.packed import IntegerTable
from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.linear import Dense, Linear
from layerwise.nn.linears.quantized import Quantized
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec, StackSpec


def merge(model: Model) -> Model:
    """The model with every linear, and a packed table of tokens, as the dense matrix it stands for: same outputs (up to rounding),
    everything trainable again."""
    new = rebuilt(model, preview_merge(model.spec))
    for name, module in model.named_modules():
        if isinstance(module, Linear) and type(module) is not Dense:
            owner, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(owner), leaf, module.merge())
        elif isinstance(module, IntegerTable):
            new.get_submodule(name).weight = nn.Parameter(module.matrix())
    return new.train(model.training)


def preview_merge(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `merge` makes of a model's description."""

    def dense(layer: LayerSpec) -> LayerSpec:
        if any(s.kind.startswith("binary") for s in layer.linears.values()):
            raise BadInput("binary linears binarize their inputs too: no dense matrix computes the same, so merge cannot make them dense")
        thin = layer.cache is not None and layer.cache.kind == "low-rank"
        return dataclasses.replace(layer, linears={}, cache=None if thin else layer.cache)

    plain = _with_stacks(spec, dense)
    if isinstance(spec.embedding, TokenSpec) and spec.embedding.table == "packed":
        plain = dataclasses.replace(plain, embedding=dataclasses.replace(spec.embedding, table="learned"))
    return dataclasses.replace(plain, adapters_only=False)


def quantize_nf4(model: Model, *, rank: int | None = None, double: bool = False, block: int = 64, seed: int | None = None) -> Model:
    """The model with the matrices of its layers in 4-bit NormalFloat, packed and frozen; with a rank, each has a trained LoRA beside it.

    Args:
        rank: of the low-rank terms (None: none). double: scales in 8 bits too. block: numbers that share a scale.
        seed: of the low-rank terms.

    Source: Dettmers et al. 2023, "QLoRA", section 3.
    """
    new = rebuilt(model, preview_nf4(model.spec, rank=rank, double=double, block=block))
    generator = torch.Generator(device=model.device).manual_seed(seed or 0)
    for name, module in model.named_modules():
        if type(module) is not Dense:
            continue
        target: Any = new.get_submodule(name)
        if isinstance(target, Quantized):
            bias = target.bias
            target.to_empty(device=model.device)
            target.store(module.weight, generator)
            target.bias = bias
    return new.train(model.training)


def preview_nf4(spec: ModelSpec, *, rank: int | None = None, double: bool = False, block: int = 64, **_: Any) -> ModelSpec:
    """What `quantize_nf4` makes of a model's description."""
    linear = LinearSpec("nf4" if rank is None else "qlora", rank=rank, double=double, block=block)

    def packed(layer: LayerSpec) -> LayerSpec:
        other = [s.kind for s in layer.linears.values() if s.kind != "dense"]
        if other:
            raise BadInput(f"this model has {other[0]} linears; dense ones are quantized: merge them first (edit: merge)")
        assert layer.width is not None
        return dataclasses.replace(layer, linears={"*": linear}).resolve(0, 1, layer.width)

    return dataclasses.replace(with_layers(spec, packed, "quantize-nf4"), adapters_only=rank is not None)


def with_layers(spec: ModelSpec, change: Callable[[LayerSpec], LayerSpec], what: str) -> ModelSpec:
    """`spec` with `change`, the edit `what`, applied to every layer of its stacks.

    Raises:
        BadInput: its layers are no transformer layers.
    """
    if not isinstance(spec.stack, StackSpec):
        raise BadInput(f"{what} needs transformer layers; this model's stack has others")
    return _with_stacks(spec, change)


def _with_stacks(spec: ModelSpec, change: Callable[[LayerSpec], LayerSpec]) -> ModelSpec:
    changed: dict[str, Any] = {}
    for name in ("stack", "decoder"):
        stack = getattr(spec, name)
        if isinstance(stack, StackSpec):
            changed[name] = stack.with_layers([change(layer) for layer in stack.layers])
    return dataclasses.replace(spec, **changed)
