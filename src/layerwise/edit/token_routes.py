"""Routers that decide token by token, put into a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.stack.parts_spec import RouterSpec
from layerwise.stack.spec import StackSpec, indices


def route_tokens(model: Model, *, layers: Sequence[str | int] | None = None, bias: float | None = None, gap: float = 0.05) -> Model:
    """The model with a router in some layers that decides for each token whether its feed-forward runs; everything else is shared.

    Fresh routers without a bias have every token active: nothing changes.
    Source: Tan et al. 2024, "DLO" (arXiv 2407.11030), see `layerwise.nn.token_router`.

    Args:
        layers: indices or slices (None: all). bias, gap: see `RouterSpec`.

    Raises:
        BadInput: the model has routers already, or a layer cannot have one (a norm behind the sum, parallel branches).
    """
    new = rebuilt(model, preview_tokens(model.spec, layers=layers, bias=bias, gap=gap))
    for layer in new.stack.layers:
        if layer.router is not None:
            layer.router.to_empty(device=model.device).to(next(layer.ffn.parameters()).dtype)
            layer.router.initialize()
    return new


def preview_tokens(spec: ModelSpec, *, layers: Sequence[str | int] | None = None, **options: Any) -> ModelSpec:
    """What `route_tokens` makes of a model's description."""
    if not isinstance(spec.stack, StackSpec) or spec.decoder is not None:
        raise BadInput("route-tokens puts routers into one stack of transformer layers; this model has others, or two")
    old = spec.stack.layers
    if any(layer.router is not None for layer in old):
        raise BadInput("this model has routers already")
    chosen = set(range(len(old))) if layers is None else {i for key in layers for i in indices(key, len(old))}
    made = [dataclasses.replace(s, router=RouterSpec("ffn", **options)) if i in chosen else s for i, s in enumerate(old)]
    return dataclasses.replace(spec, stack=spec.stack.with_layers(made))
