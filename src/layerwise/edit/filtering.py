"""Filters put on a model's layers, and taken off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import FilterSpec, ModelSpec
from layerwise.stack.spec import Activation


def add_filters(
    model: Model,
    *,
    interval: int = 1,
    layers: Sequence[int] | None = None,
    size: int | None = None,
    activation: Activation | None = None,
    seed: int | None = None,
) -> Model:
    """The model with fresh filters that read layers' outputs, for the objectives `filters` and `distillation`; it computes what it did.

    Args:
        interval: every so many layers: j has a filter if interval divides j + 1, so that the last of each group has it.
        layers: which layers instead. size: of what comes out (None: the stack's width). activation: see `FilterSpec`.
        seed: of their weights.

    Raises:
        BadInput: an interval that does not divide the depth, or layers that are not there.

    Source: Liang et al. 2023 (arXiv 2210.01351), section 3.
    """
    new = rebuilt(model, preview_add_filters(model.spec, interval=interval, layers=layers, size=size, activation=activation))
    filters: Any = new.filters
    dtype = next(model.parameters()).dtype
    filters.to_empty(device=model.device).to(dtype).initialize(0.0, torch.Generator(device=model.device).manual_seed(seed or 0))
    return new


def preview_add_filters(
    spec: ModelSpec,
    *,
    interval: int = 1,
    layers: Sequence[int] | None = None,
    size: int | None = None,
    activation: Activation | None = None,
    **_: Any,
) -> ModelSpec:
    """What `add_filters` makes of a model's description."""
    depth = spec.stack.depth
    if spec.filters is not None:
        raise BadInput("this model has filters already: drop them first (edit: drop-filters)")
    if layers is None:
        if interval < 1 or depth % interval or not depth:
            raise BadInput(f"interval must divide the depth, so that the last layer has a filter; got {interval} and depth {depth}")
        layers = range(interval - 1, depth, interval)
    return dataclasses.replace(spec, filters=FilterSpec(tuple(layers), size or spec.stack.width, activation))


def drop_filters(model: Model) -> Model:
    """The model without its filters, which computes the same and can be exported."""
    return rebuilt(model, preview_drop_filters(model.spec))


def preview_drop_filters(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `drop_filters` makes of a model's description."""
    if spec.filters is None:
        raise BadInput("this model has no filters to drop")
    return dataclasses.replace(spec, filters=None)
