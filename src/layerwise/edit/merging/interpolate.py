"""Weights between those of two networks of one shape, by depth: merging, and scaling what fine-tuning added."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from layerwise.errors import BadInput
from layerwise.models.load import load_any
from layerwise.models.spec import ModelSpec
from layerwise.stack.depth import view


def interpolate(model: Any, *, other: str | nn.Module, weight: float = 0.5, top: float | None = None) -> Any:
    """theta + lambda (theta_other - theta) for every parameter, lambda going linearly from `weight` at the first layer to `top` at the last.

    With the model as it was before fine-tuning as `model` and as it is after as `other`, this scales the task vector by depth. What lies
    before the layers counts as the first, what lies after them as the last. Buffers stay the model's own. Works on any network whose layers
    `view` finds, not only on ours.

    Source: Wortsman et al. 2022, "Model soups" (one lambda); Wang et al. 2024, "LiNeS: Post-training Layer Scaling", equation 2 (by depth).

    Args:
        other: a checkpoint's folder (in a job also `start` or `stage:NAME`), or a network.
        weight: lambda below. top: lambda above (None: the same everywhere).

    Raises:
        BadInput: the two have parameters of different names or shapes; the first difference is named.
    """
    theirs = other if isinstance(other, nn.Module) else load_any(other, str(next(model.parameters()).device))
    given = dict(theirs.named_parameters())
    mixed = copy.deepcopy(model)
    parameters = dict(mixed.named_parameters())
    odd = sorted(parameters.keys() ^ given.keys()) or [n for n, p in parameters.items() if p.shape != given[n].shape]
    if odd:
        raise BadInput(f"weights can be mixed between networks of one shape only; {odd[0]} is not the same in both")
    seen = view(model)
    depths = seen.depth_of()
    end = weight if top is None else top
    with torch.no_grad():
        for name, parameter in parameters.items():
            share = min(max(depths[name], 0), seen.depth - 1) / max(seen.depth - 1, 1)
            parameter.lerp_(given[name].to(parameter), weight + (end - weight) * share)
    return mixed


def preview_interpolate(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `interpolate` makes of a model's description: the same."""
    return spec
