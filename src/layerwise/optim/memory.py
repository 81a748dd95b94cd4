"""How much state an optimizer keeps, by formula: what a measurement is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from layerwise.optim.roles import Role, roles
from layerwise.optim.spec import OptimizerSpec

Sizes = Mapping[Role, int]


def trained_sizes(model: nn.Module) -> dict[Role, int]:
    """How many trained numbers there are in each role."""
    sizes: dict[Role, int] = {"embedding": 0, "matrix": 0, "head": 0, "vector": 0}
    role_of = roles(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes[role_of[name]] += parameter.numel()
    return sizes


def _adam(sizes: Sizes, options: Mapping[str, Any]) -> int:
    return (3 if options.get("amsgrad") else 2) * sum(sizes.values())


def _momentum(sizes: Sizes, options: Mapping[str, Any]) -> int:
    return sum(sizes.values()) if options.get("momentum") else 0


def _rmsprop(sizes: Sizes, options: Mapping[str, Any]) -> int:
    return (1 + bool(options.get("centered"))) * sum(sizes.values()) + _momentum(sizes, options)


def _adagrad(sizes: Sizes, options: Mapping[str, Any]) -> int:
    return sum(sizes.values())


def _scale(sizes: Sizes, options: Mapping[str, Any]) -> int:
    matrices = sizes["embedding"] + sizes["matrix"] + sizes["head"]
    averaged = {"head": sizes["head"], "none": 0, "all": matrices}[options.get("momentum_on", "head")]
    return averaged + 2 * sizes["vector"]


def _muon(sizes: Sizes, options: Mapping[str, Any]) -> int:
    return sizes["matrix"] + 2 * (sizes["embedding"] + sizes["head"] + sizes["vector"])


STATE: dict[str, Callable[[Sizes, Mapping[str, Any]], int]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _momentum,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "scale": _scale,
    "muon": _muon,
}
"""Optimizer -> numbers of state, from the sizes of roles and its options. Those that are absent have no formula here."""


def state_formula(spec: OptimizerSpec, sizes: Sizes) -> int | None:
    """Numbers of optimizer state, step counters left out; None where there is no formula for the optimizer."""
    formula = STATE.get(spec.name)
    return None if formula is None else formula(sizes, spec.options)
