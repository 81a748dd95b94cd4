"""How much state an optimizer keeps, by formula: what a measurement is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from layerwise.optim.spec import OptimizerSpec


def _momentum(tensors: Sequence[Tensor], options: dict[str, Any]) -> int:
    return _numel(tensors) if options.get("momentum") else 0


def _numel(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


STATE: dict[str, Callable[[Sequence[Tensor], dict[str, Any]], int]] = {
    "adamw": lambda tensors, options: (3 if options.get("amsgrad") else 2) * _numel(tensors),
    "adam": lambda tensors, options: (3 if options.get("amsgrad") else 2) * _numel(tensors),
    "sgd": _momentum,
    "rmsprop": lambda tensors, options: (1 + bool(options.get("centered"))) * _numel(tensors) + _momentum(tensors, options),
    "adagrad": lambda tensors, options: _numel(tensors),
}
"""Optimizer -> numbers of state over the trained tensors, which come in roles: see `layerwise.optim.roles`."""


def state_formula(spec: OptimizerSpec, tensors: Sequence[Tensor]) -> int | None:
    """Numbers of optimizer state for trained `tensors`; None where there is no formula for the optimizer."""
    formula = STATE.get(spec.name)
    return None if formula is None else formula(tensors, spec.options)
