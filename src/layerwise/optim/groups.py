"""Parameter groups by depth, and the optimizer over them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from layerwise.errors import BadInput
from layerwise.optim import OPTIMIZERS
from layerwise.optim.roles import roles
from layerwise.optim.spec import OptimizerSpec
from layerwise.stack.depth import view
from layerwise.stack.spec import indices
from layerwise.table import lookup, nearest


def parameter_groups(model: nn.Module, spec: OptimizerSpec, by_role: bool = False) -> list[dict[str, Any]]:
    """Trained parameters in groups of one learning rate and one weight decay, in the model's order.

    With `by_role`, a group also has one `role` (see `layerwise.optim.roles`): optimizers that treat roles differently have an
    attribute of that name.

    Each group carries `lr_scale`, the factor of the scheduled learning rate that its depth gives it. Works on any network
    whose layers `view` finds; parameters that are frozen are left out. A parameter's own `lr_scale`, if it has that attribute,
    multiplies too. Parameters with an attribute `group` share a group with those of the same name only, which the group carries as
    `name`: whoever named them can change their learning rate while training goes on.
    """
    seen = view(model)
    depths = seen.depth_of()
    by_depth = {i: scale for key, scale in spec.depth_lr.items() for i in indices(key, seen.depth)}
    role_of = roles(model) if by_role else {}
    groups: dict[tuple[float, float, Any, str | None], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depths[name]
        scale = spec.layer_decay ** (seen.depth - depth) * by_depth.get(depth, 1.0) * getattr(parameter, "lr_scale", 1.0)
        decay = spec.weight_decay if parameter.dim() >= 2 else 0.0
        role, own = role_of.get(name), getattr(parameter, "group", None)
        fields = {"lr_scale": scale, "weight_decay": decay, **({"role": role} if role else {}), **({"name": own} if own else {})}
        group = groups.setdefault((scale, decay, role, own), {"params": [], **fields})
        group["params"].append(parameter)
    if not groups:
        raise BadInput("nothing to train: every parameter of the model is frozen")
    return list(groups.values())


def check_options(spec: OptimizerSpec) -> None:
    """Refuse an option that the optimizer does not have."""
    known = [
        p for p in inspect.signature(lookup(OPTIMIZERS, spec.name, "optimizer")).parameters if p not in ("params", "lr", "weight_decay")
    ]
    for name in spec.options:
        if name not in known:
            raise BadInput(f"optimizer '{spec.name}' has no option '{name}'.{nearest(name, known)} It has: {', '.join(known)}")


def make_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer of `spec` over `model`'s trained parameters. Sets `initial_lr`, the peak, in every group."""
    check_options(spec)
    kind = lookup(OPTIMIZERS, spec.name, "optimizer")
    options = dict(spec.options)
    # PyTorch's fused SGD knows no sharded tensors; its fused Adam does.
    shards_of_sgd = spec.name == "sgd" and any(isinstance(p, DTensor) for p in model.parameters())
    if "fused" in inspect.signature(kind).parameters and not options.get("foreach") and not shards_of_sgd:
        options.setdefault("fused", True)
    groups = parameter_groups(model, spec, by_role=getattr(kind, "by_role", False))
    for group in groups:
        group["initial_lr"] = spec.lr * group["lr_scale"]
    return kind(groups, lr=spec.lr, **options)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group `factor` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
