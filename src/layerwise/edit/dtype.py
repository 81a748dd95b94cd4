"""What type of numbers a model's weights are."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec


def cast(model: Model, *, dtype: Literal["float32", "bfloat16", "float16"]) -> Model:
    """The model with its weights in another type: half the bytes on disk, or what training needs. Packed codes and their scales stay."""
    new = rebuilt(model, model.spec)
    wanted = getattr(torch, dtype)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in list(new.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(owner), leaf, nn.Parameter(parameter.detach().to(wanted), requires_grad=trained[name]))
    return new


def preview_cast(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `cast` makes of a description: the same."""
    return spec
