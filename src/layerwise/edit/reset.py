"""Weights as before any training."""

from __future__ import annotations

from typing import Any

from layerwise.models.model import Model, build
from layerwise.models.spec import ModelSpec


def initialize(model: Model, *, seed: int | None = None) -> Model:
    """A model of the same description with fresh weights, the ones that `build` draws from `seed`."""
    return build(model.spec, seed or 0, model.device).to(dtype=next(model.parameters()).dtype)


def preview_initialize(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `initialize` makes of a model's description: the same."""
    return spec
