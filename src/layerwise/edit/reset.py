"""Weights as before any training."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layerwise.errors import BadInput
from layerwise.models.model import Model, build
from layerwise.models.spec import ModelSpec
from layerwise.stack.spec import StackSpec


def initialize(model: Model, *, stack: dict[str, Any] | None = None, seed: int | None = None) -> Model:
    """A model of the same description with fresh weights, the ones that `build` draws from `seed`, and without filters.

    Args:
        stack: fields of the description's stack that differ, as in a job (`{width: 24, layer: {heads: 2}}`, or `{layers: [...]}` of a network
            of convolutional or dense layers): a student of another size beside its teacher.

    Raises:
        BadInput: such a stack cannot be.
    """
    return build(preview_initialize(model.spec, stack=stack), seed or 0, model.device).to(dtype=next(model.parameters()).dtype)


def preview_initialize(spec: ModelSpec, *, stack: dict[str, Any] | None = None, **_: Any) -> ModelSpec:
    """What `initialize` makes of a model's description: the same, but for what `stack` says."""
    plain = dataclasses.replace(spec, filters=None)
    if not stack:
        return plain
    if spec.decoder is not None:
        raise BadInput("initialize changes the stack of a model with one stack; this one is an encoder-decoder")
    old = dataclasses.asdict(spec.stack)
    changed = {**old, **stack}
    if isinstance(spec.stack, StackSpec):
        changed["layer"] = {**old["layer"], **(stack.get("layer") or {})}
    try:
        return dataclasses.replace(plain, stack=TypeAdapter(type(spec.stack)).validate_python(changed))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"stack.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
